// Markdown as DOM nodes. Text stays text: nothing here parses HTML.

export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

const INLINE = /(`+)(?<code>.+?)\1(?!`)|\*\*(?<bold>[^*]+)\*\*|\*(?<italic>[^*\s][^*]*)\*|\[(?<label>[^\]]+)\]\((?<url>https?:\/\/[^\s)]+)\)/su;

function inline(text) {
  const nodes = [];
  while (text) {
    const match = INLINE.exec(text);
    if (!match) break;
    nodes.push(text.slice(0, match.index));
    const { code, bold, italic, label, url } = match.groups;
    if (code !== undefined) nodes.push(element("code", {}, code));
    else if (bold !== undefined) nodes.push(element("strong", {}, ...inline(bold)));
    else if (italic !== undefined) nodes.push(element("em", {}, ...inline(italic)));
    else nodes.push(element("a", { href: url, rel: "noopener noreferrer", target: "_blank" }, label));
    text = text.slice(match.index + match[0].length);
  }
  return [...nodes, text];
}

const FENCE = /^\s*```/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const BULLET = /^\s*[-*+]\s+(.*)$/;
const NUMBER = /^\s*\d+[.)]\s+(.*)$/;
const SPECIAL = [FENCE, HEADING, BULLET, NUMBER];

export function markdown(text) {
  const lines = text.split("\n");
  const fragment = document.createDocumentFragment();
  const takeWhile = (test) => {
    const taken = [];
    while (lines.length && test(lines[0])) taken.push(lines.shift());
    return taken;
  };
  while (lines.length) {
    const line = lines[0];
    if (!line.trim()) {
      lines.shift();
    } else if (FENCE.test(line)) {
      lines.shift();
      const code = takeWhile((one) => !FENCE.test(one));
      lines.shift();
      fragment.append(element("pre", { tabindex: "0" }, element("code", {}, code.join("\n"))));
    } else if (HEADING.test(line)) {
      const [, marks, words] = HEADING.exec(lines.shift());
      fragment.append(element(`h${Math.min(6, marks.length + 2)}`, {}, ...inline(words)));
    } else if (BULLET.test(line) || NUMBER.test(line)) {
      const kind = BULLET.test(line) ? BULLET : NUMBER;
      const items = takeWhile((one) => kind.test(one)).map((one) => kind.exec(one)[1]);
      const list = items.map((item) => element("li", {}, ...inline(item)));
      fragment.append(element(kind === BULLET ? "ul" : "ol", {}, ...list));
    } else {
      const words = takeWhile((one) => one.trim() && !SPECIAL.some((kind) => kind.test(one)));
      fragment.append(element("p", {}, ...inline(words.join("\n"))));
    }
  }
  return fragment;
}
