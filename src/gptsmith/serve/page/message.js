// One message on the screen: as text, or as its tokens, coloured by their probability.

import { element, markdown } from "./markdown.js";

const NAMES = { user: "You", assistant: "Model", text: "Text" };

// message: role, content, and of generated ones tokens; actions: label -> function.
export function article(message, view, actions, onToken) {
  const content = element("div", { class: "content" });
  fill(content, message, view, onToken);
  const buttons = Object.entries(actions).map(([label, act]) =>
    element("button", { type: "button", onclick: act }, label));
  return element("article", { class: message.role },
    element("h2", {}, NAMES[message.role] ?? message.role), content,
    element("div", { class: "tools" }, ...buttons));
}

// Writes the text or the tokens of a message into a node.
export function fill(node, message, view, onToken) {
  if (view === "tokens" && message.tokens?.length) {
    const parts = message.tokens.map((token, i) => tokenButton(token, i, onToken));
    const before = message.before ? [element("span", {}, message.before)] : [];
    const line = element("div", { class: "tokens" }, ...before, ...parts);
    line.addEventListener("keydown", moveFocus);
    node.replaceChildren(line);
  } else {
    node.replaceChildren(markdown(message.content));
  }
}

function tokenButton(token, i, onToken) {
  const p = Math.exp(token.logprob);
  const level = p > 0.9 ? 4 : p > 0.5 ? 3 : p > 0.2 ? 2 : p > 0.05 ? 1 : 0;
  return element("button", {
    type: "button", class: `p${level}`, tabindex: i ? "-1" : "0",
    title: `${percent(token.logprob)}`, "aria-label": `${token.text}, ${percent(token.logprob)}`,
    onclick: () => onToken(i),
  }, shown(token.text));
}

function moveFocus(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || event.target.tagName !== "BUTTON") return;
  const buttons = [...event.currentTarget.querySelectorAll("button")];
  const next = buttons[buttons.indexOf(event.target) + step];
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  event.preventDefault();
}

// Tokens as the model reads them, special ones marked.
export function raw(names, special) {
  const parts = names.map((name) => special.has(name)
    ? element("span", { class: "special" }, name)
    : element("span", {}, shown(name)));
  return element("div", { class: "tokens", tabindex: "0" }, ...parts);
}

// White space that can be seen; a part of a character as its bytes.
export const shown = (text) =>
  text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t").replace(/^bytes:/, "") || "∅";

export const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 0.1 ? `${p.toFixed(1)} %` : `${p.toExponential(1)} %`;
};

// The text of tokens; a character may be spread over several.
export function textOf(tokens) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return tokens.map((token) => decoder.decode(new Uint8Array(token.bytes), { stream: true })).join("");
}

// The classes of a text as bars.
export function bars(prediction) {
  const entries = Object.entries(prediction.probabilities).sort((a, b) => b[1] - a[1]);
  return entries.map(([label, p]) => element("div", { class: "bar" },
    element("span", {}, label),
    element("meter", { min: "0", max: "1", value: p, "aria-label": label }),
    element("span", {}, `${(100 * p).toFixed(1)} %`)));
}
