// Conversations in this browser (IndexedDB), and as files of our training format.

const NAME = "conversations";

const opened = new Promise((resolve, reject) => {
  const request = indexedDB.open("gptsmith", 1);
  request.onupgradeneeded = () => request.result.createObjectStore(NAME, { keyPath: "id" });
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

async function run(mode, act) {
  const database = await opened;
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(NAME, mode);
    const request = act(transaction.objectStore(NAME));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

export const save = (conversation) => run("readwrite", (store) => store.put(conversation));
export const remove = (id) => run("readwrite", (store) => store.delete(id));

// All conversations, the newest first.
export async function all() {
  const found = await run("readonly", (store) => store.getAll());
  return found.sort((a, b) => b.updated - a.updated);
}

export function create(fields = {}) {
  // crypto.randomUUID exists on HTTPS and on this machine only
  const id = crypto.getRandomValues(new Uint32Array(4)).join("-");
  return { id, updated: Date.now(), system: "", messages: [], ...fields };
}

export function title(conversation) {
  const first = conversation.messages.find((message) => message.content.trim());
  return first ? first.content.trim().slice(0, 60) : "New conversation";
}

// The messages as the model gets them.
export function messagesOf({ system, messages }) {
  const plain = messages.map(({ role, content }) => ({ role, content }));
  return system.trim() ? [{ role: "system", content: system }, ...plain] : plain;
}

export function toLines(conversations) {
  const lines = conversations.map((one) => JSON.stringify(
    one.messages[0]?.role === "text" ? { text: one.messages[0].content } : { messages: messagesOf(one) }));
  return lines.map((line) => line + "\n").join("");
}

// The conversations of a file. Throws Error with the number of a line that is none.
export function fromLines(text) {
  const lines = text.split("\n").map((line, i) => [line, i + 1]);
  return lines.filter(([line]) => line.trim()).map(([line, number]) => {
    let messages, text;
    try {
      ({ messages, text } = JSON.parse(line));
    } catch {
      throw new Error(`line ${number}: not a JSON object`);
    }
    if (typeof text === "string") return create({ messages: [{ role: "text", content: text }] });
    const valid = Array.isArray(messages) && messages.every(
      (m) => typeof m?.content === "string" && ["system", "user", "assistant"].includes(m.role));
    if (!valid || !messages.length) {
      throw new Error(`line ${number}: expected messages with role (system, user or assistant) and content`);
    }
    const system = messages[0].role === "system" ? messages[0].content : "";
    const rest = messages.slice(messages[0].role === "system" ? 1 : 0);
    return create({ system, messages: rest.map(({ role, content }) => ({ role, content })) });
  });
}
