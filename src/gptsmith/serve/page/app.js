// The chat page: conversations on the left, the current one on the right.

import { asking, get, post, stream } from "./api.js";
import { element } from "./markdown.js";
import { article, bars, fill, percent, raw, shown, textOf } from "./message.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const SAMPLING = [
  ["temperature", "Temperature", 0.6], ["top_p", "Top-p", 1], ["top_k", "Top-k (0: all)", 0],
  ["min_p", "Min-p", 0], ["repetition_penalty", "Repetition penalty", 1],
  ["max_tokens", "Max new tokens", 300], ["seed", "Seed (empty: random)", ""],
];
const ALTERNATIVES = 8;

let models = [];
let conversations = [];
let current = store.create();
let view = "text";
let running = null; // AbortController of the reply in progress

const model = () => models.find((one) => one.id === $("model").value);
const isText = () => model()?.kind === "text";

// Small parts

function status(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

async function attempt(act) {
  try {
    await act();
  } catch (error) {
    if (error.name !== "AbortError") status(error.message, true);
  }
}

function sampling() {
  const fields = {};
  for (const [name] of SAMPLING) {
    const value = $(name).value.trim();
    if (value !== "") fields[name] = Number(value);
  }
  return fields;
}

async function keep(conversation = current) {
  conversation.updated = Date.now();
  if (conversation.messages.length) await store.save(conversation);
  else await store.remove(conversation.id);
  conversations = await store.all();
  drawList();
}

// Drawing

function drawList() {
  $("list").replaceChildren(...conversations.map((one) => element("li", {},
    element("button", {
      type: "button", "aria-current": one.id === current.id ? "true" : null,
      onclick: () => open(one.id === current.id ? current : one),
    }, store.title(one)),
    element("button", {
      type: "button", "aria-label": `Delete ${store.title(one)}`,
      onclick: () => attempt(async () => {
        if (!confirm(`Delete "${store.title(one)}"?`)) return;
        await store.remove(one.id);
        if (one.id === current.id) {
          current.messages.length = 0; // a reply in progress is not kept either
          open(store.create());
        }
        await keep();
      }),
    }, "×"))));
}

function draw() {
  const kind = model()?.kind;
  $("input-label").textContent =
    kind === "text" ? "Text to continue" : kind === "classifier" ? "Text to classify" : "Message";
  $("send").textContent =
    kind === "text" ? "Continue" : kind === "classifier" ? "Classify" : "Send";
  $("settings").hidden = $("views").hidden = kind === "classifier";
  $("messages").hidden = kind === "classifier";
  $("system").closest("label").hidden = kind === "text";
  $("bars").replaceChildren();
  if (view === "raw" && kind !== "classifier") {
    attempt(drawRaw);
    return;
  }
  $("messages").replaceChildren(...current.messages.map((message, i) =>
    article(message, view, actions(message, i), (k) => showToken(i, k))));
  $("messages").scrollTop = $("messages").scrollHeight;
}

async function drawRaw() {
  const last = current.messages.at(-1);
  if (!last) {
    $("messages").replaceChildren(element("p", { class: "hint" }, "Nothing to show yet."));
    return;
  }
  const conversation = current;
  const found = await post("/tokenize", { model: model().id, ...context() });
  if (view !== "raw" || conversation !== current) return;
  const note = `${found.count} tokens of at most ${found.max_model_len}, as the model reads them`;
  $("messages").replaceChildren(element("p", { class: "hint" }, note),
    raw(found.token_strs, new Set(model().special_tokens)));
}

function actions(message, i) {
  if (running) return {};
  const last = i === current.messages.length - 1;
  const all = { Edit: () => edit(i) };
  if (message.role === "assistant") {
    all.Regenerate = () => attempt(async () => {
      current.messages.length = i;
      await reply();
    });
  }
  if (last && message.role !== "user") all.Continue = () => attempt(() => reply());
  if (last && message.role === "user") all.Answer = () => attempt(() => reply());
  all["Delete from here"] = () => attempt(async () => {
    current.messages.length = i;
    draw();
    await keep();
  });
  return all;
}

function edit(i) {
  const message = current.messages[i];
  const box = element("textarea", { rows: "4", "aria-label": "Text of the message" });
  box.value = message.content;
  const done = (changed) => attempt(async () => {
    if (changed && box.value !== message.content) {
      current.messages[i] = { role: message.role, content: box.value };
    }
    draw();
    $("messages").children[i]?.querySelector(".tools button")?.focus();
    if (changed) await keep();
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") done(false);
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) done(true);
  });
  $("messages").children[i].querySelector(".content").replaceChildren(box,
    element("div", { class: "tools" },
      element("button", { type: "button", onclick: () => done(true) }, "Save"),
      element("button", { type: "button", onclick: () => done(false) }, "Cancel")));
  box.focus();
}

function open(conversation) {
  if (conversation !== current) running?.abort();
  current = conversation;
  $("system").value = current.system;
  $("side").classList.remove("open");
  $("menu").setAttribute("aria-expanded", "false");
  draw();
  drawList();
  $("input").focus();
}

// Generating

// The part of a request body that says what the model reads: generated tokens as ids, text that
// was typed or edited as text.
function context() {
  const last = current.messages.at(-1);
  const ids = last.tokens?.map((one) => one.id) ?? [];
  if (isText()) return { prompt: ids.length ? [...last.prefix, ...ids] : last.content };
  const messages = store.messagesOf(current);
  if (last.role !== "assistant") return { messages };
  const written = last.before ?? (ids.length ? "" : last.content);
  if (written) messages.at(-1).content = written;
  else messages.pop();
  return { messages, continue_final_message: Boolean(written), continue_token_ids: ids };
}

function question() {
  const body = {
    model: model().id, ...sampling(), return_token_ids: true,
    stream_options: { include_usage: true }, ...context(),
  };
  if (isText()) return ["/v1/completions", { ...body, logprobs: ALTERNATIVES }];
  return ["/v1/chat/completions", { ...body, logprobs: true, top_logprobs: ALTERNATIVES }];
}

// Reply to the last message, or continue it if it is the model's.
async function reply() {
  if (running) return;
  const conversation = current;
  const [path, body] = question();
  let message = conversation.messages.at(-1);
  if (message.role === "user") {
    message = { role: "assistant", content: "" };
    conversation.messages.push(message);
  } else if (!message.tokens) {
    message.before = message.content;
  }
  message.tokens ??= [];
  const control = running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  draw();
  if (document.activeElement === document.body) $("stop").focus(); // the button pressed is gone
  status("Generating …");
  const started = performance.now();
  let count = 0;
  let reason = "";
  let ended = "";
  let frame = 0;
  const show = () => {
    frame = 0;
    const box = $("messages");
    const node = box.lastElementChild?.querySelector(".content");
    if (running !== control || conversation !== current || view === "raw" || !node) return;
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    fill(node, message, view, (k) => showToken(conversation.messages.indexOf(message), k));
    if (atEnd) box.scrollTop = box.scrollHeight;
  };
  try {
    for await (const chunk of stream(path, body, control.signal)) {
      for (const choice of chunk.choices) {
        if (choice.prompt_token_ids) message.prefix ??= choice.prompt_token_ids;
        message.content += choice.text ?? choice.delta?.content ?? "";
        const scored = choice.logprobs?.content ?? [];
        message.tokens.push(...scored.map(token));
        count += scored.length;
        reason = choice.finish_reason ?? reason;
      }
      frame ||= requestAnimationFrame(show);
    }
    const seconds = (performance.now() - started) / 1000;
    const end = reason === "length" ? "; stopped at the limit: Continue adds more" : "";
    ended = `${count} tokens in ${seconds.toFixed(1)} s${end}`;
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    ended = `stopped after ${count} tokens`;
  } finally {
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
    if (!message.content && !message.tokens.length) conversation.messages.pop();
    draw();
    if ([document.body, $("stop")].includes(document.activeElement)) $("input").focus();
    await keep(conversation);
  }
  status(ended);
}

const token = ({ token_id, token, bytes, logprob, top_logprobs = [] }) => ({
  id: token_id, text: token, bytes, logprob, top: top_logprobs.map((one) => ({
    id: one.token_id, text: one.token, bytes: one.bytes, logprob: one.logprob,
  })),
});

function showToken(i, k) {
  const message = current.messages[i];
  const chosen = message.tokens[k];
  $("token-title").textContent = `“${shown(chosen.text)}”: ${percent(chosen.logprob)}`;
  $("token-note").textContent = "Alternatives, with their probabilities:";
  $("alternatives").replaceChildren(...chosen.top.map((one) => element("li", {},
    element("button", {
      type: "button", disabled: one.id === chosen.id || running !== null,
      onclick: () => attempt(() => goOn(i, k, one)),
    }, `${shown(one.text)}  ${percent(one.logprob)}`))));
  $("token").showModal();
}

// Replace token k of a message by an alternative, and generate from there.
async function goOn(i, k, other) {
  $("token").close();
  const message = current.messages[i];
  current.messages.length = i + 1;
  const { top } = message.tokens[k];
  message.tokens.length = k;
  const ends = model().special_tokens.includes(other.text);
  if (!ends) message.tokens.push({ ...other, top });
  message.content = (message.before ?? "") + textOf(message.tokens);
  if (ends) {
    draw();
    await keep();
  } else {
    await reply();
  }
}

async function classify(text) {
  const found = await post("/v1/classify", { model: model().id, input: text });
  $("bars").replaceChildren(...bars(found.data[0]));
  status(`${found.data[0].predicted}`);
}

async function send() {
  const text = $("input").value;
  if (running || !model() || !text.trim()) return;
  if (model().kind === "classifier") {
    await classify(text);
    return;
  }
  $("input").value = "";
  if (isText()) {
    const last = current.messages.at(-1);
    if (last) current.messages[current.messages.length - 1] = { role: "text", content: last.content + text };
    else current.messages.push({ role: "text", content: text });
  } else {
    current.messages.push({ role: "user", content: text });
  }
  await keep();
  await reply();
}

// Controls

function save(text, name) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function connect() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(send);
  });
  $("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      attempt(send);
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  document.addEventListener("visibilitychange", () => attempt(async () => {
    if (document.hidden || running) return;
    conversations = await store.all(); // another tab may have changed them
    const newer = conversations.find((one) => one.id === current.id && one.updated > current.updated);
    if (newer) open(newer);
    else drawList();
  }));
  $("stop").addEventListener("click", () => running?.abort());
  $("new").addEventListener("click", () => open(store.create()));
  $("menu").addEventListener("click", () => {
    const isOpen = $("side").classList.toggle("open");
    $("menu").setAttribute("aria-expanded", String(isOpen));
  });
  $("model").addEventListener("change", () => {
    localStorage.setItem("gptsmith-model", $("model").value);
    open(store.create());
  });
  $("views").addEventListener("change", (event) => {
    view = event.target.value;
    draw();
  });
  $("system").addEventListener("change", () => {
    current.system = $("system").value;
    attempt(keep);
  });
  $("export").addEventListener("click", () => attempt(async () => {
    save(store.toLines(await store.all()), "conversations.jsonl");
  }));
  $("import").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => attempt(async () => {
    const [file] = $("file").files;
    $("file").value = "";
    const found = store.fromLines(await file.text());
    for (const one of found) await store.save(one);
    conversations = await store.all();
    open(found[0] ?? current);
    status(`${found.length} conversations imported`);
  }));
  asking.key = () => new Promise((resolve) => {
    $("key-input").value = $("key").returnValue = "";
    $("key").addEventListener("close", () => {
      resolve($("key").returnValue && $("key-input").value);
    }, { once: true });
    $("key").showModal();
  });
}

function drawSettings() {
  const kept = JSON.parse(localStorage.getItem("gptsmith-sampling") ?? "{}");
  const system = element("label", { class: "wide" }, "System message",
    element("textarea", { id: "system", rows: "2" }));
  const numbers = SAMPLING.map(([name, label, value]) => {
    const input = element("input", { id: name, type: "number", min: "0", step: "any" });
    input.value = kept[name] ?? value;
    input.addEventListener("change", () => {
      localStorage.setItem("gptsmith-sampling", JSON.stringify(sampling()));
    });
    return element("label", {}, label, input);
  });
  $("fields").replaceChildren(system, ...numbers);
}

async function start() {
  drawSettings();
  connect();
  models = (await get("/v1/models")).data;
  $("model").replaceChildren(...models.map((one) => element("option", { value: one.id }, one.id)));
  const chosen = localStorage.getItem("gptsmith-model");
  if (models.some((one) => one.id === chosen)) $("model").value = chosen;
  conversations = await store.all();
  open(store.create());
}

attempt(start);
