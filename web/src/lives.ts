// Marks become lives: of each sample, when it waited, computed, wrote, and gave way.

import type { Mark } from "./live";

export type Phase = "queue" | "prefill" | "decode" | "preempted";

export interface Span {
  phase: Phase;
  from: number;
  to: number | null; // null: it goes on
  tokens: number; // of a prefill chunk
}

export interface Life {
  name: string;
  id: string;
  sample: number;
  spans: Span[];
  began: number;
  arrived: number | null;
  firstToken: number | null;
  ended: number | null;
  reason: string;
  cached: number;
  total: number; // tokens at its end
  computed: number; // prompt tokens that went through the model before the first token
  preemptions: number;
}

const MOST = 200;

export class Lives {
  readonly all = new Map<string, Life>();
  /** Time and duration of each first token, oldest first. */
  readonly firstTokens: { at: number; after: number }[] = [];

  clear(): void {
    this.all.clear();
    this.firstTokens.length = 0;
  }

  add([, time, id, sample, kind, start, stop, reason]: Mark): void {
    const name = `${id}/${sample}`;
    let life = this.all.get(name);
    if (!life || (kind === "arrived" && life.ended !== null)) {
      this.all.delete(name);
      life = {
        name,
        id,
        sample,
        spans: [],
        began: time,
        arrived: null,
        firstToken: null,
        ended: null,
        reason: "",
        cached: 0,
        total: 0,
        computed: 0,
        preemptions: 0,
      };
      this.all.set(name, life);
      if (this.all.size > MOST) this.all.delete(this.all.keys().next().value as string);
    }
    const open = life.spans.at(-1);
    const begin = (phase: Phase) => {
      if (open && open.to === null) open.to = time;
      life.spans.push({ phase, from: time, to: null, tokens: 0 });
    };
    switch (kind) {
      case "arrived":
        life.arrived = time;
        begin("queue");
        break;
      case "admitted":
        if (!life.preemptions) life.cached = stop;
        begin("prefill");
        break;
      case "computed":
        if (open && open.to === null) {
          open.phase = "prefill";
          open.tokens = stop - start;
        }
        if (life.firstToken === null) life.computed += stop - start;
        // After a preemption it goes on writing, unless another chunk says otherwise.
        begin(life.firstToken === null ? "prefill" : "decode");
        break;
      case "first_token":
        life.firstToken = time;
        // Its last chunk has just ended, and writing began there.
        if (open && open.to === null && open.phase === "prefill" && !open.tokens) open.phase = "decode";
        else begin("decode");
        if (life.arrived !== null) this.firstTokens.push({ at: time, after: time - life.arrived });
        if (this.firstTokens.length > MOST) this.firstTokens.shift();
        break;
      case "preempted":
        life.preemptions += 1;
        begin("preempted");
        break;
      case "ended":
        if (open && open.to === null) open.to = time;
        life.ended = time;
        life.reason = reason;
        life.total = stop;
        break;
    }
  }
}
