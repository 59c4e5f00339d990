// The block map: every block of one pool as a small square, coloured by what it is to whom.
// What changes lights up for a moment. Pointer or arrow keys ask a block what it holds.

import { request } from "./api";
import { h } from "./dom";
import { count, oneLine, plural, shortId } from "./format";
import { colours, onTheme } from "./theme";
import { hasTip, hideTip, showTip } from "./tip";

interface Detail {
  start: number;
  num_tokens: number;
  tokens: { id: number; text: string }[];
  owners: { request: string; sample: number }[];
  cached: boolean;
  saved: boolean;
}

const PITCHES = [19, 16, 14, 12, 10, 9, 8, 7, 6, 5, 4, 3];
const FADE = 900; // milliseconds
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export interface MapOptions {
  label: string;
  host: boolean;
  group: number;
  height: number;
}

export class BlockMap {
  readonly canvas: HTMLCanvasElement;
  /** Blocks to be pointed out, as when their branch of the tree is. */
  private marked = new Set<number>();
  private states: Uint8Array = new Uint8Array();
  private lit = new Map<number, number>(); // cell -> when it changed
  private pitch = 12;
  private columns = 1;
  private stride = 1; // blocks of one cell, where there are too many
  private cursor = -1; // a cell
  private frame = 0;
  private asked = 0;

  constructor(private readonly options: MapOptions) {
    this.canvas = h("canvas", {
      class: "map",
      tabindex: 0,
      role: "application",
      "aria-roledescription": "block map",
      "aria-label": `${options.label}. Arrow keys go from block to block.`,
      onpointermove: (event: PointerEvent) => this.point(event),
      onpointerleave: () => this.leave(),
      onblur: () => this.leave(),
      onkeydown: (event: KeyboardEvent) => this.walk(event),
    });
    new ResizeObserver(() => this.layOut()).observe(this.canvas);
    onTheme(() => this.draw());
  }

  /** All blocks; the first is the null block of a pool and not shown. */
  show(states: Uint8Array): void {
    const resized = states.length !== this.states.length;
    this.states = states;
    if (resized) this.layOut();
    else this.draw();
  }

  /** Some blocks have changed: let them light up. */
  light(start: number, length: number): void {
    const now = performance.now();
    for (let block = start; block < start + length; block++) {
      const cell = this.cellOf(block);
      if (cell < 0) continue;
      this.lit.set(cell, now);
      if (cell === this.cursor && hasTip(this.canvas)) this.askSoon(cell, 60);
    }
    this.animate();
  }

  mark(blocks: Iterable<number>): void {
    this.marked = new Set(blocks);
    this.draw();
  }

  private get first(): number {
    return this.options.host ? 0 : 1;
  }

  private get cells(): number {
    return Math.max(0, Math.ceil((this.states.length - this.first) / this.stride));
  }

  private cellOf(block: number): number {
    return block < this.first ? -1 : Math.floor((block - this.first) / this.stride);
  }

  private layOut(): void {
    const width = this.canvas.parentElement?.clientWidth ?? 0;
    if (!width || !this.states.length) return;
    const blocks = this.states.length - this.first;
    this.stride = 1;
    const fits = (pitch: number) =>
      Math.ceil(Math.ceil(blocks / this.stride) / Math.floor(width / pitch)) * pitch <= this.options.height;
    let pitch = PITCHES.find(fits);
    while (pitch === undefined) {
      this.stride *= 2;
      if (fits(3)) pitch = 3;
    }
    this.pitch = pitch;
    this.columns = Math.max(1, Math.floor(width / pitch));
    const height = Math.max(1, Math.ceil(this.cells / this.columns)) * pitch;
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(this.columns * pitch * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.width = `${this.columns * pitch}px`;
    this.canvas.style.height = `${height}px`;
    this.draw();
  }

  /** The liveliest state of a cell's blocks. */
  private stateOf(cell: number): number {
    const start = this.first + cell * this.stride;
    if (this.stride === 1) return this.states[start] ?? 0;
    let state = 0;
    for (let i = start; i < Math.min(start + this.stride, this.states.length); i++) {
      state = Math.max(state, this.states[i] ?? 0);
    }
    return state;
  }

  private draw(): void {
    const context = this.canvas.getContext("2d");
    if (!context) return;
    const scale = devicePixelRatio || 1;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    for (let cell = 0; cell < this.cells; cell++) this.drawCell(context, cell);
  }

  private drawCell(context: CanvasRenderingContext2D, cell: number): void {
    const palette = colours();
    const { pitch } = this;
    const gap = pitch >= 8 ? 2 : 1;
    const size = pitch - gap;
    const x = (cell % this.columns) * pitch;
    const y = Math.floor(cell / this.columns) * pitch;
    const state = this.stateOf(cell);
    const { host } = this.options;
    const round = pitch >= 8 ? Math.min(4, size / 3.5) : 0;
    context.clearRect(x, y, pitch, pitch);
    const fill = state >= 4 ? palette.shared : state >= 2 ? palette.used : state ? (host ? palette.host : palette.published) : palette.free;
    context.fillStyle = fill;
    box(context, x, y, size, round);
    context.fill();
    // Used and published already: others may join, so it has an eye.
    if (!host && (state === 3 || state === 5) && pitch >= 8) {
      context.fillStyle = palette.paper;
      context.beginPath();
      context.arc(x + size / 2, y + size / 2, size / 7, 0, 7);
      context.fill();
    }
    const since = this.lit.get(cell);
    if (since !== undefined && !calm.matches) {
      const left = 1 - (performance.now() - since) / FADE;
      if (left > 0) {
        context.globalAlpha = 0.75 * left * left;
        context.fillStyle = palette.ink;
        box(context, x, y, size, round);
        context.fill();
        context.globalAlpha = 1;
      }
    }
    const start = this.first + cell * this.stride;
    if (cell === this.cursor || this.isMarked(start)) {
      context.strokeStyle = palette.ink;
      context.lineWidth = 1.5;
      box(context, x + 0.75, y + 0.75, size - 1.5, round);
      context.stroke();
    }
  }

  private isMarked(start: number): boolean {
    if (!this.marked.size) return false;
    for (let i = start; i < start + this.stride; i++) if (this.marked.has(i)) return true;
    return false;
  }

  private animate(): void {
    if (this.frame) return;
    const step = () => {
      const context = this.canvas.getContext("2d");
      const now = performance.now();
      for (const [cell, since] of this.lit) {
        if (context) this.drawCell(context, cell);
        if (now - since > FADE) this.lit.delete(cell);
      }
      this.frame = this.lit.size && !document.hidden ? requestAnimationFrame(step) : 0;
    };
    this.frame = requestAnimationFrame(step);
  }

  // -- asking a block -------------------------------------------------------------------------

  private point(event: PointerEvent): void {
    const column = Math.floor(event.offsetX / this.pitch);
    const cell = Math.floor(event.offsetY / this.pitch) * this.columns + column;
    this.moveTo(column < this.columns && cell < this.cells ? cell : -1, 60);
  }

  private walk(event: KeyboardEvent): void {
    const steps: Record<string, number> = {
      ArrowRight: 1,
      ArrowLeft: -1,
      ArrowDown: this.columns,
      ArrowUp: -this.columns,
    };
    const step = steps[event.key];
    if (event.key === "Escape") this.leave();
    if (step === undefined) return;
    event.preventDefault();
    const next = this.cursor < 0 ? 0 : this.cursor + step;
    if (next >= 0 && next < this.cells) this.moveTo(next, 0);
  }

  private leave(): void {
    this.moveTo(-1, 0);
    hideTip(this.canvas);
  }

  private moveTo(cell: number, patience: number): void {
    if (cell === this.cursor) return;
    this.cursor = cell;
    this.draw();
    clearTimeout(this.asked);
    if (cell < 0) hideTip(this.canvas);
    else this.askSoon(cell, patience);
  }

  private askSoon(cell: number, patience: number): void {
    clearTimeout(this.asked);
    this.asked = setTimeout(() => void this.explain(cell), patience);
  }

  private async explain(cell: number): Promise<void> {
    const block = this.first + cell * this.stride;
    const { group, host } = this.options;
    const at = () => {
      const rect = this.canvas.getBoundingClientRect();
      const x = rect.left + ((cell % this.columns) + 0.5) * this.pitch;
      return [x, rect.top + Math.floor(cell / this.columns) * this.pitch] as const;
    };
    const name = `${host ? "Host block" : "Block"} ${count(block)}`;
    const state = this.states[block] ?? 0;
    if (!state) {
      showTip(this.canvas, ...at(), h("p", {}, h("b", {}, name), " is free"));
      return;
    }
    let detail: Detail;
    try {
      const tier = host ? "host" : "pool";
      const response = await request(`v1/cache/blocks/${group}/${block}?tier=${tier}`);
      detail = (await response.json()) as Detail;
    } catch {
      return;
    }
    if (this.cursor !== cell) return;
    showTip(this.canvas, ...at(), ...describe(name, detail, host));
  }
}

function describe(name: string, detail: Detail, host: boolean): HTMLElement[] {
  const owners = detail.owners.length;
  const role = host
    ? "in host memory"
    : owners > 1
      ? `shared by ${owners}`
      : owners
        ? "used by one"
        : detail.cached
          ? "published, waiting to be hit again"
          : "free";
  const parts = [h("p", {}, h("b", {}, name), ` ${role}`)];
  if (detail.tokens.length) {
    const text = h("p", { class: "tokens" });
    for (const token of detail.tokens) text.append(h("span", {}, oneLine(token.text) || " "));
    parts.push(text);
  }
  const notes: string[] = [];
  if (detail.num_tokens) {
    notes.push(`positions ${count(detail.start)} to ${count(detail.start + detail.num_tokens - 1)}`);
  }
  if (owners) {
    const names = detail.owners.slice(0, 4).map((o) => shortId(o.request) + (o.sample ? `/${o.sample}` : ""));
    notes.push(`for ${names.join(", ")}${owners > 4 ? ` and ${plural(owners - 4, "other")}` : ""}`);
  }
  if (owners && detail.cached) notes.push("published");
  if (detail.saved && !host) notes.push("also in host memory");
  if (notes.length) parts.push(h("p", { class: "notes" }, notes.join(" · ")));
  return parts;
}

function box(context: CanvasRenderingContext2D, x: number, y: number, size: number, round: number): void {
  context.beginPath();
  if (round) context.roundRect(x, y, size, size, round);
  else context.rect(x, y, size, size);
}
