// The server: JSON requests and streams, with the API key of this tab.

const KEY = "gptsmith-api-key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Asks the person for a key, "" if there is none; set by app.js.
export const asking = { key: async () => "" };

function lost(error) {
  throw error.name === "AbortError" ? error : new ApiError(0, "the server cannot be reached");
}

async function request(path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers: {
        ...(body === undefined ? {} : { "Content-Type": "application/json" }),
        ...(key ? { Authorization: `Bearer ${key}` } : {}),
      },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    }).catch(lost);
    if (response.ok) return response;
    if (response.status !== 401) {
      const answer = await response.json().catch(() => null);
      throw new ApiError(response.status, answer?.error?.message ?? response.statusText);
    }
    sessionStorage.removeItem(KEY);
    const given = await asking.key();
    if (!given) throw new ApiError(401, "this server needs an API key: reload the page to enter it");
    sessionStorage.setItem(KEY, given);
  }
}

export const get = async (path) => (await request(path)).json();
export const post = async (path, body, signal) => (await request(path, body, signal)).json();

// The chunks of a streamed answer. Throws ApiError, also for an error in the middle of it.
export async function* stream(path, body, signal) {
  const response = await request(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read().catch(lost);
    if (done) throw new ApiError(0, "the connection ended before the reply was complete");
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a comment that keeps the connection open
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(0, chunk.error.message);
      yield chunk;
    }
  }
}
