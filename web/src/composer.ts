// Where questions are written: text, pictures, how tokens are chosen, and the button that stops.

import { h, icon, put } from "./dom";
import type { Settings } from "./settings";

export interface Question {
  text: string;
  images: string[]; // data URLs
}

interface Actions {
  send: (question: Question) => void;
  stop: () => void;
  anew: () => void;
}

const LARGEST = 2048; // pixels; larger pictures are scaled down before they are sent
const MOST_BYTES = 4_000_000;

export class Composer {
  readonly element: HTMLElement;
  private readonly box: HTMLTextAreaElement;
  private readonly sendButton: HTMLButtonElement;
  private readonly thumbs = h("ul", { class: "thumbs", "aria-label": "Pictures to send" });
  private readonly problem = h("p", { class: "problem", role: "alert" });
  private images: string[] = [];
  private isBusy = false;

  constructor(
    settings: Settings,
    private readonly actions: Actions,
  ) {
    this.box = h("textarea", {
      id: "prompt",
      rows: 1,
      placeholder: "Ask something",
      "aria-label": "Your message",
      "aria-keyshortcuts": "Enter",
      autocomplete: "off",
      oninput: () => this.grow(),
      onkeydown: (event: KeyboardEvent) => {
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
          event.preventDefault();
          this.submit();
        }
      },
      onpaste: (event: ClipboardEvent) => {
        const files = event.clipboardData?.files;
        if (files?.length) {
          event.preventDefault();
          void this.attach(files);
        }
      },
    });
    const picker = h("input", {
      type: "file",
      accept: "image/*",
      multiple: true,
      hidden: true,
      onchange: () => {
        if (picker.files) void this.attach(picker.files);
        picker.value = "";
      },
    });
    const open = h(
      "button",
      {
        type: "button",
        class: "plain",
        "aria-label": "How tokens are chosen",
        title: "How tokens are chosen",
        "aria-expanded": "false",
        "aria-controls": "settings",
        onclick: () => {
          settings.element.hidden = !settings.element.hidden;
          open.setAttribute("aria-expanded", String(!settings.element.hidden));
        },
      },
      icon("sliders"),
    );
    this.sendButton = h("button", { type: "submit", class: "send" });
    this.element = h(
      "form",
      {
        class: "composer",
        onsubmit: (event: Event) => {
          event.preventDefault();
          if (this.isBusy) this.actions.stop();
          else this.submit();
        },
        ondragover: (event: DragEvent) => {
          event.preventDefault();
          this.element.classList.add("over");
        },
        ondragleave: () => this.element.classList.remove("over"),
        ondrop: (event: DragEvent) => {
          event.preventDefault();
          this.element.classList.remove("over");
          if (event.dataTransfer?.files.length) void this.attach(event.dataTransfer.files);
        },
      },
      settings.element,
      this.thumbs,
      this.problem,
      this.box,
      h(
        "div",
        { class: "tools" },
        h("button", { type: "button", class: "plain", "aria-label": "Add a picture", title: "Add a picture", onclick: () => picker.click() }, icon("picture")),
        picker,
        open,
        settings.probabilities,
        h("button", { type: "button", class: "text", onclick: () => this.actions.anew() }, "New chat"),
        this.sendButton,
      ),
    );
    this.busy = false;
  }

  set busy(busy: boolean) {
    this.isBusy = busy;
    const label = busy ? "Stop" : "Send";
    this.sendButton.setAttribute("aria-label", label);
    this.sendButton.title = busy ? "Stop (Escape)" : "Send (Enter)";
    put(this.sendButton, icon(busy ? "stop" : "send"));
  }

  focus(): void {
    this.box.focus({ preventScroll: true });
  }

  private submit(): void {
    const text = this.box.value.trim();
    if (this.isBusy || (!text && !this.images.length)) return;
    const { images } = this;
    this.images = [];
    this.box.value = "";
    this.grow();
    this.showThumbs();
    this.actions.send({ text, images });
  }

  private grow(): void {
    this.box.style.height = "auto";
    this.box.style.height = `${Math.min(this.box.scrollHeight, 220)}px`;
  }

  private async attach(files: FileList): Promise<void> {
    put(this.problem);
    for (const file of [...files]) {
      try {
        if (!file.type.startsWith("image/")) throw new Error("is not a picture");
        this.images.push(await dataUrl(file));
      } catch (error) {
        put(this.problem, `${file.name} ${error instanceof Error ? error.message : "cannot be read"}`);
      }
    }
    this.showThumbs();
  }

  private showThumbs(): void {
    put(
      this.thumbs,
      ...this.images.map((src, i) =>
        h(
          "li",
          {},
          h("img", { src, alt: `picture ${i + 1}` }),
          h(
            "button",
            {
              type: "button",
              "aria-label": `Remove picture ${i + 1}`,
              onclick: () => {
                this.images.splice(i, 1);
                this.showThumbs();
              },
            },
            icon("remove"),
          ),
        ),
      ),
    );
  }
}

/** A picture as a data URL: as it is if it is small and of a common kind, else scaled down. */
async function dataUrl(file: File): Promise<string> {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error("is not a picture that this browser can read");
  });
  const shrink = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
  if (shrink === 1 && file.size < MOST_BYTES && /^image\/(png|jpeg|webp)$/.test(file.type)) {
    return new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result as string);
      reader.onerror = () => reject(new Error("cannot be read"));
      reader.readAsDataURL(file);
    });
  }
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * shrink);
  canvas.height = Math.round(bitmap.height * shrink);
  const context = canvas.getContext("2d");
  if (!context) throw new Error("cannot be scaled down");
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return file.type === "image/png" ? canvas.toDataURL("image/png") : canvas.toDataURL("image/jpeg", 0.92);
}
