// As much Markdown as models write, turned into elements. Text only ever becomes text nodes, so
// nothing that a model says can become markup.

import { h } from "./dom";

/** Renders growing text: blocks that did not change keep their elements. */
export class Markdown {
  readonly element = h("div", { class: "prose" });
  private blocks: string[] = [];

  show(text: string): void {
    const blocks = split(text);
    let same = 0;
    while (same < blocks.length && same < this.blocks.length && blocks[same] === this.blocks[same]) same++;
    while (this.element.children.length > same) this.element.lastElementChild?.remove();
    for (const block of blocks.slice(same)) this.element.append(render(block));
    this.blocks = blocks;
  }
}

const FENCE = /^\s{0,3}(```+|~~~+)\s*(\S*)/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;

/** The text's blocks: fences whole, everything else parted by empty lines. */
function split(text: string): string[] {
  const blocks: string[] = [];
  let lines: string[] = [];
  let fence = "";
  const close = () => {
    if (lines.length) blocks.push(lines.join("\n"));
    lines = [];
  };
  for (const line of text.split("\n")) {
    const mark = FENCE.exec(line)?.[1];
    if (fence) {
      lines.push(line);
      if (mark?.startsWith(fence)) {
        fence = "";
        close();
      }
    } else if (mark) {
      close();
      fence = mark;
      lines.push(line);
    } else if (!line.trim()) {
      close();
    } else if (HEADING.test(line) || RULE.test(line)) {
      close();
      blocks.push(line);
    } else {
      // A list may follow a paragraph without an empty line.
      const item = ITEM.test(line);
      const inList = lines.length > 0 && ITEM.test(lines[0] ?? "");
      if (item && lines.length && !inList) close();
      lines.push(line);
    }
  }
  close();
  return blocks;
}

function render(block: string): HTMLElement {
  const lines = block.split("\n");
  const fence = FENCE.exec(lines[0] ?? "");
  if (fence) {
    const closed = lines.length > 1 && FENCE.test(lines.at(-1) ?? "");
    const code = lines.slice(1, closed ? -1 : undefined).join("\n");
    return h("pre", { tabindex: 0, "aria-label": fence[2] ? `${fence[2]} code` : "code" }, h("code", {}, code));
  }
  const heading = HEADING.exec(block);
  if (heading) {
    const level = Math.min(6, (heading[1]?.length ?? 1) + 2) as 3 | 4 | 5 | 6;
    return inline(h(`h${level}`), heading[2] ?? "");
  }
  if (RULE.test(block)) return h("hr");
  if (lines.every((line) => /^\s{0,3}>/.test(line))) {
    const quote = h("blockquote");
    for (const part of split(lines.map((line) => line.replace(/^\s{0,3}> ?/, "")).join("\n"))) {
      quote.append(render(part));
    }
    return quote;
  }
  if (ITEM.test(lines[0] ?? "")) return list(lines);
  if (lines.length > 1 && /^\s*\|?[\s:|-]+\|[\s:|-]*$/.test(lines[1] ?? "")) return table(lines);
  const paragraph = h("p");
  lines.forEach((line, i) => {
    if (i) paragraph.append(/ {2}$/.test(lines[i - 1] ?? "") ? h("br") : " ");
    inline(paragraph, line.trim());
  });
  return paragraph;
}

function list(lines: string[]): HTMLElement {
  const first = ITEM.exec(lines[0] ?? "");
  const indent = first?.[1]?.length ?? 0;
  const ordered = /\d/.test(first?.[2] ?? "");
  const start = ordered ? parseInt(first?.[2] ?? "1", 10) : null;
  const element = ordered ? h("ol", { start }) : h("ul");
  let own: string[] = [];
  let nested: string[] = [];
  const close = () => {
    if (!own.length) return;
    const item = inline(h("li"), own.join(" "));
    if (nested.length) item.append(ITEM.test(nested[0] ?? "") ? list(nested) : render(nested.join("\n")));
    element.append(item);
    own = [];
    nested = [];
  };
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && (item[1]?.length ?? 0) <= indent + 1) {
      close();
      own.push(item[3] ?? "");
    } else if (item || nested.length) {
      nested.push(line);
    } else {
      own.push(line.trim());
    }
  }
  close();
  return element;
}

function table(lines: string[]): HTMLElement {
  const cells = (line: string) =>
    line
      .trim()
      .replace(/^\||\|$/g, "")
      .split("|")
      .map((cell) => cell.trim());
  const row = (line: string, tag: "th" | "td") => h("tr", {}, ...cells(line).map((cell) => inline(h(tag), cell)));
  return h(
    "div",
    { class: "wide", tabindex: 0, role: "region", "aria-label": "table" },
    h("table", {}, h("thead", {}, row(lines[0] ?? "", "th")), h("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")))),
  );
}

// Code, links, bold, italic, struck: the first that begins is taken, and what is in it again.
const SPANS = /(`+)([\s\S]+?)\1(?!`)|\[([^\]\n]+)\]\(([^()\s]+)\)|(https?:\/\/[^\s<>()]+[^\s<>().,;:!?'"])|\*\*([\s\S]+?)\*\*|__([\s\S]+?)__|\*([^\s*](?:[\s\S]*?[^\s*])?)\*|(?<!\w)_([^\s_](?:[\s\S]*?[^\s_])?)_(?!\w)|~~([\s\S]+?)~~/;

/** Append a line's spans to an element. */
function inline<E extends Element>(element: E, text: string): E {
  let rest = text;
  for (let found = SPANS.exec(rest); found; found = SPANS.exec(rest)) {
    const [all, , code, label, target, address, bold, bolder, italic, italics, struck] = found;
    element.append(rest.slice(0, found.index));
    if (code !== undefined) element.append(h("code", {}, code.trim() || code));
    else if (label !== undefined) element.append(link(target ?? "", label));
    else if (address !== undefined) element.append(link(address, address));
    else if (bold ?? bolder) element.append(inline(h("strong"), bold ?? bolder ?? ""));
    else if (italic ?? italics) element.append(inline(h("em"), italic ?? italics ?? ""));
    else element.append(inline(h("s"), struck ?? ""));
    rest = rest.slice(found.index + all.length);
  }
  element.append(rest);
  return element;
}

function link(target: string, label: string): HTMLElement {
  // A model may write any address: only plain web links, which leave on a click and say where to.
  if (!/^https?:\/\//i.test(target)) return inline(h("span"), label);
  return inline(h("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow", title: target }), label);
}
