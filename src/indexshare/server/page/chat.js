// The conversation: turns, the request that is running, and what the user may do with the last turn.

import { Failure, streamChat } from "./api.js";
import { makeButton, ReplyView, userView } from "./answer.js";
import { contentOf } from "./composer.js";
import { say } from "./i18n.js";
import { Recording } from "./selection.js";

export class Chat {
  #turns = []; // { draft, view, userElement, recording }
  #controller = null;
  #list = document.getElementById("turns");
  #scroller = document.getElementById("conversation");
  #page;

  /** `page` has: settings, model, askForKey(), busy(bool), edit(draft), record(recording, finished), announce(key). */
  constructor(page) {
    this.#page = page;
  }

  get isBusy() {
    return this.#controller !== null;
  }

  stop() {
    this.#controller?.abort();
  }

  clear() {
    this.stop();
    this.#turns = [];
    this.#list.replaceChildren();
    this.#page.record(null, true);
    this.#changed();
  }

  async send(draft) {
    const turn = { draft, userElement: userView(draft), view: null, recording: null };
    this.#turns.push(turn);
    this.#list.append(turn.userElement);
    await this.#run(turn);
  }

  #messages() {
    const { system } = this.#page.settings.values;
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const { draft, view } of this.#turns) {
      messages.push({ role: "user", content: contentOf(draft) });
      if (!view?.content) continue;
      const { content, reasoning } = view;
      messages.push({ role: "assistant", content, ...(reasoning && { reasoning_content: reasoning }) });
    }
    return messages;
  }

  /** Get the reply to the last turn, in place of the one that it may have. */
  async #run(turn) {
    turn.view?.element.remove();
    turn.view = null;
    turn.recording = null;
    const { settings } = this.#page;
    const body = { model: this.#page.model, messages: this.#messages(), ...settings.requestFields() };
    const controller = (this.#controller = new AbortController());
    const view = (turn.view = new ReplyView());
    this.#list.append(view.element);
    this.#changed();
    this.#follow(true);
    let usage = null;
    let wantsKey = false;
    try {
      if (body.indexshare) this.#page.record((turn.recording = new Recording()), false);
      for await (const chunk of streamChat(body, settings.key, controller.signal)) {
        const isAtEnd = this.#isAtEnd();
        if (chunk.indexshare?.selected && turn.recording) {
          turn.recording.add(chunk.indexshare.selected);
          this.#page.record(turn.recording, false);
        }
        usage = chunk.usage ?? usage;
        const choice = chunk.choices[0];
        if (choice) view.append(choice.delta);
        if (choice?.finish_reason === "length") view.remark("cut_off");
        else if (choice?.finish_reason && !view.content) view.remark("no_answer");
        this.#follow(isAtEnd);
      }
      this.#page.announce("finished");
    } catch (error) {
      if (error.name === "AbortError") view.remark("stopped");
      else if (error instanceof Failure) view.remark(error.key, error.values, error.detail, true);
      else throw error;
      wantsKey = error.status === 401;
    } finally {
      const isAtEnd = this.#isAtEnd();
      view.finish(usage, this.#buttons(turn));
      // A new chat may have taken the place of this one.
      if (this.#controller === controller) this.#controller = null;
      if (turn.recording && this.#turns.includes(turn)) this.#page.record(turn.recording, true);
      this.#changed();
      this.#follow(isAtEnd);
    }
    if (wantsKey && (await this.#page.askForKey()) && this.#turns.at(-1) === turn) await this.#run(turn);
  }

  #buttons(turn) {
    const copy = makeButton("copy", async () => {
      await navigator.clipboard.writeText(turn.view.content);
      say(copy, "copied");
      setTimeout(() => say(copy, "copy"), 1500);
    });
    const retry = makeButton("retry", () => this.#run(turn));
    retry.classList.add("last-only");
    const buttons = turn.view.content ? [copy, retry] : [retry];
    if (turn.recording?.prompt) buttons.push(makeButton("read_button", () => this.#page.record(turn.recording, true, true)));
    return buttons;
  }

  #changed() {
    document.getElementById("welcome").hidden = this.#turns.length > 0;
    this.#page.busy(this.isBusy);
    const last = this.#turns.at(-1);
    for (const turn of this.#turns) turn.userElement.querySelector("footer").replaceChildren();
    if (last && !this.isBusy) last.userElement.querySelector("footer").append(makeButton("edit", () => this.#edit()));
  }

  #edit() {
    const { draft, userElement, view } = this.#turns.pop();
    userElement.remove();
    view?.element.remove();
    this.#page.edit(draft);
    this.#changed();
  }

  #isAtEnd() {
    const { scrollTop, scrollHeight, clientHeight } = this.#scroller;
    return scrollTop + clientHeight > scrollHeight - 40;
  }

  #follow(isAtEnd) {
    if (isAtEnd) this.#scroller.scrollTop = this.#scroller.scrollHeight;
  }
}
