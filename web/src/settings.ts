// How tokens are chosen, and what the model is told first. Empty fields leave it to the model.

import { h } from "./dom";

interface Field {
  name: string;
  label: string;
  min: number;
  max?: number;
  step: number;
}

const FIELDS: Field[] = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05 },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k", min: 0, step: 1 },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01 },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1 },
  { name: "max_tokens", label: "Longest answer", min: 1, step: 1 },
  { name: "seed", label: "Seed", min: 0, step: 1 },
];

export class Settings {
  readonly element: HTMLElement;
  /** The switch that colours tokens by their probability. */
  readonly probabilities: HTMLElement;
  private readonly inputs = new Map<string, HTMLInputElement>();
  private readonly first: HTMLTextAreaElement;
  private readonly think: HTMLSelectElement;
  private readonly showProbabilities: HTMLInputElement;

  constructor() {
    const fields = FIELDS.map(({ name, label, min, max, step }) => {
      const input = h("input", { type: "number", min, max: max ?? null, step, placeholder: "model’s", inputmode: "decimal" });
      this.inputs.set(name, input);
      return h("label", {}, label, input);
    });
    this.first = h("textarea", { rows: 2, placeholder: "none" });
    this.think = h(
      "select",
      {},
      h("option", { value: "" }, "as the model does"),
      h("option", { value: "true" }, "yes"),
      h("option", { value: "false" }, "no"),
    );
    this.element = h(
      "fieldset",
      { class: "settings", id: "settings", hidden: true },
      h("legend", { class: "unseen" }, "How tokens are chosen"),
      h("div", { class: "fields" }, ...fields, h("label", {}, "Think first", this.think)),
      h("label", { class: "whole" }, "System message", this.first),
    );
    this.showProbabilities = h("input", { type: "checkbox", role: "switch" });
    this.probabilities = h(
      "label",
      { class: "switch", title: "Colour each token by how likely it was" },
      this.showProbabilities,
      h("span", {}, "Probabilities"),
    );
  }

  /** The system message, if there is one. */
  system(): { role: "system"; content: string }[] {
    const content = this.first.value.trim();
    return content ? [{ role: "system", content }] : [];
  }

  /** What goes into the request beside the messages. */
  parameters(): Record<string, unknown> {
    const given: Record<string, unknown> = {};
    for (const [name, input] of this.inputs) {
      if (input.value !== "" && Number.isFinite(input.valueAsNumber)) given[name] = input.valueAsNumber;
    }
    if (this.think.value) given.chat_template_kwargs = { enable_thinking: this.think.value === "true" };
    if (this.showProbabilities.checked) {
      given.logprobs = true;
      given.top_logprobs = 5;
    }
    return given;
  }
}
