// The cache as the server tells of it: one whole picture, then what changes. Views listen to it.

import { events, request } from "./api";

export const FREE = 0;
export const PUBLISHED = 1; // nobody's, waiting to be hit again
export const USED = 2; // 3: used and published
export const SHARED = 4; // 5: shared and published

export interface Group {
  window: number | null;
  sinks: number;
  map: Uint8Array;
  host: Uint8Array;
}

export interface Values {
  now: number;
  step: number;
  running: number;
  waiting: number;
  computed: number;
  output: number;
  queried: number;
  hit: number;
  host_hit: number;
  fork: number;
  evicted: number;
  preemptions: number;
  prefixes: number;
}

export interface Branch {
  id: number;
  from: number;
  root: number;
  text: string;
  blocks: number[];
  saved: string;
}

// id, sample, prompt tokens, output tokens, computed tokens, blocks
export type Row = [string, number, number, number, number, number];

export type MarkKind = "arrived" | "admitted" | "computed" | "first_token" | "preempted" | "ended";
// serial, time, id, sample, kind, start, stop, reason
export type Mark = [number, number, string, number, MarkKind, number, number, string];

interface Whole {
  model: string;
  block_size: number;
  text: boolean;
  v: Values;
  groups: { window: number | null; sinks: number; map: string; host: string }[];
  marks: Mark[];
  rows: { running: Row[]; waiting: Row[] };
  tree: Branch[];
}

type Change = [number, string];

interface Delta {
  v: Values;
  map?: [Change[], Change[]][];
  marks?: Mark[];
  rows?: { running: Row[]; waiting: Row[] };
  tree?: Branch[];
}

/** What is new for the views; block indices by group, tier after tier. */
export interface News {
  whole: boolean;
  marks: Mark[];
  tree: boolean;
  changed: { group: number; host: boolean; start: number; count: number }[];
}

const digits = (text: string): Uint8Array => Uint8Array.from(text, (c) => c.charCodeAt(0) - 48);

export class Live {
  model = "";
  blockSize = 0;
  showsText = true;
  values: Values | null = null;
  groups: Group[] = [];
  rows: { running: Row[]; waiting: Row[] } = { running: [], waiting: [] };
  tree: Branch[] = [];
  onNews: (news: News) => void = () => undefined;
  onLink: (state: "connecting" | "live" | "lost") => void = () => undefined;

  private clockOffset = 0;
  private stream: AbortController | null = null;

  /** Follow the server from now on; while the page is hidden nobody looks, so nothing is asked. */
  start(): void {
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.stop();
      else void this.follow();
    });
    if (!document.hidden) void this.follow();
  }

  /** The engine's clock, in seconds. */
  now(): number {
    return performance.now() / 1000 + this.clockOffset;
  }

  private stop(): void {
    this.stream?.abort();
    this.stream = null;
  }

  private async follow(): Promise<void> {
    this.stop();
    const stream = new AbortController();
    this.stream = stream;
    let wait = 0.5;
    while (!stream.signal.aborted) {
      this.onLink("connecting");
      try {
        const response = await request("v1/cache/events", { signal: stream.signal });
        this.onLink("live");
        for await (const { event, data } of events(response)) {
          wait = 0.5;
          if (event === "whole") this.takeWhole(JSON.parse(data) as Whole);
          else if (event === "delta") this.takeDelta(JSON.parse(data) as Delta);
        }
      } catch {
        // told below, and tried again
      }
      if (stream.signal.aborted) return;
      this.onLink("lost");
      await new Promise((resolve) => setTimeout(resolve, wait * 1000));
      wait = Math.min(2 * wait, 15);
    }
  }

  private takeWhole(whole: Whole): void {
    this.model = whole.model;
    this.blockSize = whole.block_size;
    this.showsText = whole.text;
    this.groups = whole.groups.map((g) => ({ ...g, map: digits(g.map), host: digits(g.host) }));
    this.rows = whole.rows;
    this.tree = whole.tree;
    this.clockOffset = whole.v.now - performance.now() / 1000;
    this.values = whole.v;
    this.onNews({ whole: true, marks: whole.marks, tree: true, changed: [] });
  }

  private takeDelta(delta: Delta): void {
    this.values = delta.v;
    // Drift towards the server's clock slowly: a frame that was late must not turn back time.
    const offset = delta.v.now - performance.now() / 1000;
    this.clockOffset += 0.2 * (offset - this.clockOffset);
    const changed: News["changed"] = [];
    delta.map?.forEach((tiers, group) => {
      const own = this.groups[group];
      if (!own) return;
      tiers.forEach((changes, tier) => {
        for (const [start, states] of changes) {
          (tier ? own.host : own.map).set(digits(states), start);
          changed.push({ group, host: tier === 1, start, count: states.length });
        }
      });
    });
    if (delta.rows) this.rows = delta.rows;
    if (delta.tree) this.tree = delta.tree;
    this.onNews({ whole: false, marks: delta.marks ?? [], tree: !!delta.tree, changed });
  }
}

/** How many blocks of a group are in each state. */
export function tally(group: Group): { free: number; used: number; shared: number; published: number } {
  const seen = [0, 0, 0, 0, 0, 0];
  for (let i = 1; i < group.map.length; i++) seen[group.map[i] ?? 0]!++;
  return {
    free: seen[0]!,
    published: seen[1]!,
    used: seen[2]! + seen[3]!,
    shared: seen[4]! + seen[5]!,
  };
}
