// The prefix tree as what the engine is named after: a twig. Branches part where texts part, each
// bud is a block, and a branch that somebody is reading right now ends in a leaf.

import { h, put, s } from "./dom";
import { oneLine, plural } from "./format";
import { PUBLISHED, USED, type Branch, type Live } from "./live";
import { hideTip, showTip } from "./tip";

const LINE = 27; // height of a row
const ROWS = 40; // that are drawn at most
const LETTER = 5.9; // width of one, about
const STEM = 14;
const BEND = 22; // width of the curve into a branch

interface Placed {
  branch: Branch;
  from: Placed | null;
  children: Placed[];
  start: number; // blocks before it
  y: number;
}

export class Tree {
  readonly element: HTMLElement;
  private placed: Placed[] = [];
  private buds = new Map<number, SVGElement[]>(); // block of the pool -> its buds

  constructor(
    private readonly live: Live,
    private readonly onBranch: (blocks: number[]) => void,
  ) {
    this.element = h("div", { class: "tree" });
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  /** Draw what the tree is now. */
  draw(): void {
    const width = this.element.clientWidth;
    if (!width) return;
    const { roots, hidden } = this.plant();
    this.buds.clear();
    if (!roots.length) {
      put(this.element, h("p", { class: "empty" }, "Nothing is kept yet: the first full block will be the first bud."));
      return;
    }
    const deepest = Math.max(...this.placed.map((p) => p.start + p.branch.blocks.length));
    const bends = Math.max(...this.placed.map((p) => depthOf(p)));
    // A third of the width is for what the last blocks of each branch say.
    const bud = Math.min(15, Math.max(1, (0.64 * width - STEM - bends * BEND) / deepest));
    const height = Math.max(...this.placed.map((p) => p.y)) + LINE * 0.6;
    const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "tree", "aria-label": "Prefix tree" });
    const at = (p: Placed, blocks: number) => STEM + depthOf(p) * BEND + blocks * bud;
    const top = Math.min(...roots.map((p) => p.y));
    const bottom = Math.max(...roots.map((p) => p.y));
    if (bottom > top) svg.append(s("path", { class: "twig", d: `M${STEM / 2} ${bottom}V${top}`, "stroke-width": 3 }));
    for (const p of this.placed) svg.append(this.drawBranch(p, at, bud, width));
    put(
      this.element,
      svg,
      hidden > 0 && h("p", { class: "more" }, `and ${plural(hidden, "more branch", "more branches")}`),
    );
    this.colour();
  }

  /** Colour the buds by what their blocks are now. */
  colour(): void {
    const map = this.live.groups[0]?.map;
    for (const [block, buds] of this.buds) {
      const state = map?.[block] ?? 0;
      const name = state >= 4 ? "shared" : state >= USED ? "used" : state === PUBLISHED ? "published" : "gone";
      for (const bud of buds) {
        const base = bud.classList.contains("leaf") ? "leaf" : "bud";
        const wanted = `${base} ${name}`;
        if (bud.getAttribute("class") !== wanted) bud.setAttribute("class", wanted);
      }
    }
  }

  /** Give every branch a row and a parent; the youngest come first. */
  private plant(): { roots: Placed[]; hidden: number } {
    const byId = new Map<number, Placed>();
    const roots: Placed[] = [];
    for (const branch of this.live.tree) {
      const from = byId.get(branch.from) ?? null;
      if (branch.from && !from) continue;
      const start = from ? from.start + from.branch.blocks.length : 0;
      const placed = { branch, from, children: [], start, y: 0 };
      byId.set(branch.id, placed);
      (from ? from.children : roots).push(placed);
    }
    this.placed = [];
    let row = 0;
    let hidden = 0;
    const place = (p: Placed): void => {
      if (row >= ROWS) {
        hidden += 1;
        return;
      }
      this.placed.push(p);
      if (!p.children.length) {
        p.y = LINE * (0.75 + row++);
        return;
      }
      for (const child of p.children) place(child);
      const rows = p.children.filter((child) => child.y).map((child) => child.y);
      p.y = rows.length ? (rows[0]! + rows.at(-1)!) / 2 : LINE * (0.75 + row++);
    };
    for (const root of roots) place(root);
    return { roots: roots.filter((root) => root.y), hidden };
  }

  private drawBranch(
    p: Placed,
    at: (p: Placed, blocks: number) => number,
    bud: number,
    width: number,
  ): SVGElement {
    const { blocks, saved, text } = p.branch;
    const x0 = at(p, p.start);
    const x1 = at(p, p.start + blocks.length);
    const fromX = p.from ? at(p.from, p.start) : STEM / 2;
    const fromY = p.from ? p.from.y : p.y;
    const inPool = blocks.filter((b) => b > 0).length;
    const inHost = [...saved].filter((c) => c === "1").length;
    const bend = (fromX + x0) / 2;
    const thick = Math.min(5, 1.4 + Math.log2(1 + weight(p)) / 2.2);
    const label = `${plural(blocks.length, "block")}, ${inPool} in the pool${inHost ? `, ${inHost} in host memory` : ""}`;
    const group = s(
      "g",
      {
        class: "branch",
        role: "treeitem",
        tabindex: 0,
        "aria-label": text ? `${label}: ${oneLine(text)}` : label,
        onpointerenter: () => this.point(p, label),
        onpointerleave: () => this.point(null, ""),
        onfocus: () => this.point(p, label),
        onblur: () => this.point(null, ""),
      },
      s("path", { class: "reach", d: `M${fromX} ${fromY}C${bend} ${fromY} ${bend} ${p.y} ${x0} ${p.y}H${x1 + 10}` }),
      s("path", {
        class: "twig",
        d: `M${fromX} ${fromY}C${bend} ${fromY} ${bend} ${p.y} ${x0} ${p.y}H${x1}`,
        "stroke-width": thick.toFixed(2),
      }),
    );
    const radius = Math.min(4.2, Math.max(0.8, bud * 0.36));
    blocks.forEach((block, i) => {
      const x = x0 + (i + 0.5) * bud;
      const name = block ? "bud" : saved[i] === "1" ? "bud host" : "bud gone";
      const leaf = !p.children.length && i === blocks.length - 1 && block > 0 && bud > 4;
      const shape = leaf ? s("path", { class: "leaf", d: leafAt(x, p.y) }) : s("circle", { class: name, cx: x, cy: p.y, r: radius });
      group.append(shape);
      if (!block) return;
      const known = this.buds.get(block);
      if (known) known.push(shape);
      else this.buds.set(block, [shape]);
    });
    // The end of a twig says its text behind it, a part with twigs of its own above it.
    const last = !p.children.length;
    const x = last ? x1 + 16 : x0 + 2;
    const fits = Math.floor(((last ? width : x1) - x) / LETTER);
    if (text && fits > 7) {
      const words = text.replace(/^[^\p{L}\p{N}]+/u, "").trimEnd().replace(/\s*\n\s*/g, " · ");
      const shown = words.length > fits ? `${words.slice(0, fits - 1)}…` : words;
      group.append(s("text", { x, y: last ? p.y + 4 : p.y - 8 }, shown));
    }
    return group;
  }

  private point(p: Placed | null, label: string): void {
    if (!p) {
      hideTip(this.element);
      this.onBranch([]);
      return;
    }
    this.onBranch(p.branch.blocks.filter((block) => block > 0));
    const rect = this.element.getBoundingClientRect();
    const x = rect.left + Math.min(rect.width / 2, 200);
    const parts = [h("p", {}, h("b", {}, label))];
    if (p.branch.text) parts.push(h("p", { class: "quote" }, `${p.branch.text.trim()} …`));
    showTip(this.element, x, rect.top + p.y - this.element.scrollTop - 8, ...parts);
  }
}

function depthOf(p: Placed): number {
  let depth = 1;
  for (let from = p.from; from; from = from.from) depth += 1;
  return depth;
}

/** Blocks of a branch and of all that grows from it. */
function weight(p: Placed): number {
  return p.branch.blocks.length + p.children.reduce((sum, child) => sum + weight(child), 0);
}

function leafAt(x: number, y: number): string {
  return `M${x - 3} ${y}C${x} ${y - 7} ${x + 7} ${y - 7} ${x + 13} ${y - 3}C${x + 9} ${y + 4} ${x + 2} ${y + 5} ${x - 3} ${y}Z`;
}
