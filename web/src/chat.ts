// The conversation: what was said, what is being said, and what the cache did for it.

import { events, request } from "./api";
import { byId, h, icon, put } from "./dom";
import { count, percent, plural, seconds } from "./format";
import { Markdown } from "./markdown";
import { Composer, type Question } from "./composer";
import { Settings } from "./settings";
import { Tokens, type TokenLogprob } from "./tokens";

type Content = string | ({ type: "text"; text: string } | { type: "image_url"; image_url: { url: string } })[];

interface Message {
  role: "user" | "assistant";
  content: Content;
}

interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  prompt_tokens_details?: { cached_tokens?: number } | null;
}

interface Chunk {
  choices?: {
    delta?: { content?: string | null; reasoning_content?: string | null };
    logprobs?: { content?: TokenLogprob[] | null } | null;
    finish_reason?: string | null;
  }[];
  usage?: Usage | null;
  error?: { message?: string };
}

const STARTERS = [
  "Why does a language model keep its keys and values?",
  "Write four lines about a twig in winter.",
  "Explain paged memory to a gardener, in two short paragraphs.",
];

export class Chat {
  private readonly log = h("div", { class: "log", role: "log", "aria-label": "Messages", tabindex: 0 });
  private readonly said = h("p", { class: "unseen", role: "status" });
  private readonly settings = new Settings();
  private readonly composer: Composer;
  private messages: Message[] = [];
  private question: Message | null = null; // the last one, to be asked again
  private under: AbortController | null = null;
  private model = "";

  constructor() {
    this.composer = new Composer(this.settings, {
      send: (question) => void this.ask(question),
      stop: () => this.under?.abort(),
      anew: () => this.begin(),
    });
    put(byId("chat"), this.log, this.composer.element, this.said);
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.under?.abort();
    });
    this.begin();
  }

  /** Learn which model there is. */
  async meet(): Promise<void> {
    const listed = await (await request("v1/models")).json();
    this.model = listed?.data?.[0]?.id ?? "";
    const name = this.model.split("/").at(-1) ?? "";
    put(byId("model"), name);
    document.title = name ? `${name} · kvist` : "kvist";
  }

  private begin(): void {
    this.under?.abort();
    this.messages = [];
    this.question = null;
    put(
      this.log,
      h(
        "div",
        { class: "welcome" },
        h("h2", {}, "Ask something, and watch it being remembered."),
        h("p", {}, "Every token’s keys and values are computed once and kept in blocks. Ask twice, and the second time the question comes out of the cache."),
        h("ul", {}, ...STARTERS.map((text) => h("li", {}, h("button", { type: "button", onclick: () => void this.ask({ text, images: [] }) }, text)))),
      ),
    );
    this.composer.busy = false;
    this.composer.focus();
  }

  private async ask(question: Question): Promise<void> {
    if (this.under) return;
    if (!this.messages.length) put(this.log);
    const content: Content = question.images.length
      ? [
          ...question.images.map((url) => ({ type: "image_url" as const, image_url: { url } })),
          { type: "text" as const, text: question.text },
        ]
      : question.text;
    this.question = { role: "user", content };
    this.messages.push(this.question);
    this.log.append(
      h(
        "article",
        { class: "message user", "aria-label": "You" },
        question.images.length > 0 &&
          h("div", { class: "pictures" }, ...question.images.map((src) => h("img", { src, alt: "attached picture" }))),
        h("p", {}, question.text),
      ),
    );
    await this.answer();
  }

  private async answer(): Promise<void> {
    const under = new AbortController();
    this.under = under;
    this.composer.busy = true;
    const answer = new Answer(() => this.again(answer));
    this.log.append(answer.element);
    this.follow(true);
    const began = performance.now();
    try {
      if (!this.model) await this.meet();
      const response = await request("v1/chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        signal: under.signal,
        body: JSON.stringify({
          model: this.model,
          messages: [...this.settings.system(), ...this.messages],
          stream: true,
          stream_options: { include_usage: true },
          ...this.settings.parameters(),
        }),
      });
      for await (const { data } of events(response)) {
        if (data === "[DONE]") break;
        const near = this.isNearEnd();
        answer.take(JSON.parse(data) as Chunk, (performance.now() - began) / 1000);
        this.follow(near);
      }
      answer.end("");
    } catch (error) {
      answer.end(under.signal.aborted ? "stopped" : error instanceof Error ? error.message : String(error), !under.signal.aborted);
    }
    this.follow(this.isNearEnd());
    // A question without an answer is no part of what the next one builds on.
    if (answer.text) this.messages.push({ role: "assistant", content: answer.text });
    else this.messages = this.messages.filter((message) => message !== this.question);
    if (this.under === under) {
      this.under = null;
      this.composer.busy = false;
      put(this.said, "Answer complete.");
    }
  }

  /** Ask the last question once more. */
  private again(answer: Answer): void {
    if (this.under || this.log.lastElementChild !== answer.element) return;
    if (!this.question) return;
    if (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    if (this.messages.at(-1) !== this.question) this.messages.push(this.question);
    answer.element.remove();
    void this.answer();
  }

  private isNearEnd(): boolean {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 80;
  }

  private follow(near: boolean): void {
    if (near) this.log.scrollTop = this.log.scrollHeight;
  }
}

/** One answer, growing. */
class Answer {
  readonly element: HTMLElement;
  text = "";
  private thought = "";
  private readonly prose = new Markdown();
  private readonly thinking = new Markdown();
  private readonly fold: HTMLDetailsElement;
  private readonly foldTitle = h("summary", {}, "thinking");
  private readonly tokens = new Tokens();
  private readonly body = h("div", { class: "body" });
  private readonly foot = h("footer");
  private usage: Usage | null = null;
  private firstAfter = 0;
  private lastAfter = 0;
  private reason = "";
  private drawn = 0;

  constructor(private readonly retry: () => void) {
    this.fold = h("details", { class: "thinking", hidden: true, open: true }, this.foldTitle, this.thinking.element);
    put(this.body, this.prose.element);
    this.element = h("article", { class: "message assistant", "aria-label": "Answer", "aria-busy": "true" }, this.fold, this.body, this.foot);
  }

  take(chunk: Chunk, after: number): void {
    if (chunk.error) throw new Error(chunk.error.message ?? "the server broke off");
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { content, reasoning_content: thought } = choice.delta ?? {};
    if (content || thought) {
      this.firstAfter ||= after;
      this.lastAfter = after;
    }
    if (thought) this.thought += thought;
    if (content) {
      if (!this.text && this.thought) this.closeThought(after);
      this.text += content;
    }
    const logprobs = choice.logprobs?.content;
    if (logprobs?.length && !(thought && !content)) {
      if (!this.tokens.length) put(this.body, this.tokens.element);
      this.tokens.add(logprobs);
    }
    if (choice.finish_reason) this.reason = choice.finish_reason;
    // Once a frame is often enough, however fast tokens come.
    this.drawn ||= requestAnimationFrame(() => this.draw());
  }

  end(note: string, failed = false): void {
    cancelAnimationFrame(this.drawn);
    this.draw();
    this.element.removeAttribute("aria-busy");
    if (this.thought && !this.text) this.closeThought(this.lastAfter);
    if (failed) {
      this.element.classList.add("failed");
      this.body.append(h("p", { class: "problem", role: "alert" }, note));
    }
    const notes: string[] = [];
    if (this.usage) {
      const { prompt_tokens: prompt, completion_tokens: written } = this.usage;
      const cached = this.usage.prompt_tokens_details?.cached_tokens ?? 0;
      const took = this.lastAfter - this.firstAfter;
      notes.push(plural(written, "token"));
      if (written > 1 && took > 0) notes.push(`${count((written - 1) / took)}/s`);
      notes.push(`first after ${seconds(this.firstAfter)}`);
      notes.push(cached ? `${count(cached)} of ${count(prompt)} prompt tokens from the cache (${percent(cached / prompt)})` : `${count(prompt)} prompt tokens, none cached yet`);
    }
    if (this.reason === "length") notes.push("cut at the limit");
    if (note && !failed) notes.push(note);
    put(
      this.foot,
      h("span", {}, notes.join(" · ")),
      h("span", { class: "acts" }, this.copyButton(), h("button", { type: "button", class: "plain", "aria-label": "Ask again", title: "Ask again", onclick: this.retry }, icon("again"))),
    );
  }

  private copyButton(): HTMLElement {
    return h(
      "button",
      {
        type: "button",
        class: "plain",
        "aria-label": "Copy the answer",
        title: "Copy the answer",
        onclick: () => void navigator.clipboard?.writeText(this.text),
      },
      icon("copy"),
    );
  }

  private draw(): void {
    this.drawn = 0;
    if (this.thought) {
      this.fold.hidden = false;
      this.thinking.show(this.thought);
    }
    if (!this.tokens.length) this.prose.show(this.text);
  }

  private closeThought(after: number): void {
    this.fold.open = false;
    put(this.foldTitle, `thought for ${seconds(after - this.firstAfter)}`);
  }
}
