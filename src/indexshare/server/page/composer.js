// Where a message is written: a growing text field, and documents that are attached, dropped or pasted.

import { say, t } from "./i18n.js";
import { make } from "./answer.js";

const LONG_PASTE = 4000; // characters; a longer text that is pasted becomes an attachment

/** The content of a user message: the documents first, so that the prefix cache keeps them, then what was typed. */
export function contentOf({ text, attachments }) {
  const documents = attachments.map(({ name, text: document }) => `<document name=${JSON.stringify(name)}>\n${document}\n</document>\n\n`);
  return documents.join("") + text;
}

export class Composer {
  attachments = []; // { name, text }
  #draft = document.getElementById("draft");
  #list = document.getElementById("attachments");
  #numPasted = 0;
  #complain;

  /** `send` is called with a draft { text, attachments }; `complain(text)` shows an error. */
  constructor(send, complain) {
    this.#complain = complain;
    const form = document.getElementById("composer");
    const files = document.getElementById("files");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const text = this.#draft.value.trim();
      if (text || this.attachments.length) send({ text, attachments: this.attachments });
    });
    this.#draft.addEventListener("keydown", (event) => {
      // Enter that ends the composition of a Chinese word does not send.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    });
    this.#draft.addEventListener("paste", (event) => this.#pasted(event));
    document.getElementById("attach").addEventListener("click", () => files.click());
    files.addEventListener("change", async () => {
      await this.#attach(files.files);
      files.value = "";
    });
    form.addEventListener("dragover", (event) => event.preventDefault());
    form.addEventListener("drop", (event) => {
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      this.#attach(event.dataTransfer.files);
    });
  }

  /** Replace what is there by a draft, or by nothing. */
  fill({ text, attachments } = { text: "", attachments: [] }) {
    this.#draft.value = text;
    this.attachments = attachments;
    this.#showAttachments();
    this.#draft.focus();
  }

  #pasted(event) {
    const text = event.clipboardData.getData("text/plain");
    if (text.length < LONG_PASTE) return;
    event.preventDefault();
    this.#add({ name: t("pasted", { number: ++this.#numPasted }), text });
  }

  async #attach(files) {
    for (const file of files) {
      try {
        this.#add({ name: file.name, text: new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer()) });
      } catch {
        this.#complain("not_text", { name: file.name });
      }
    }
  }

  #add(attachment) {
    this.attachments = [...this.attachments, attachment];
    this.#showAttachments();
  }

  #showAttachments() {
    const items = this.attachments.map((attachment) => {
      const words = make("span");
      say(words, "attachment", { name: attachment.name, size: attachment.text.length });
      const remove = make("button", "tool small", "×");
      remove.type = "button";
      remove.ariaLabel = t("remove", { name: attachment.name });
      remove.addEventListener("click", () => {
        this.attachments = this.attachments.filter((other) => other !== attachment);
        this.#showAttachments();
        this.#draft.focus();
      });
      return make("li", "", words, remove);
    });
    this.#list.replaceChildren(...items);
  }
}
