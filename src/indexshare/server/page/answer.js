// What a conversation looks like: the user's messages and the replies. Text of the model only ever becomes text nodes.

import { say } from "./i18n.js";

export function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

export function makeButton(key, action) {
  const button = make("button", "tool small");
  button.type = "button";
  say(button, key);
  button.addEventListener("click", action);
  return button;
}

/** Text that grows; lines between ``` fences stand in a <pre>. */
class GrowingText {
  #root;
  #node = null; // the text node that grows
  #isCode = false;
  #held = ""; // the start of a line that is, or may become, a fence
  #isInLine = false; // a part of this line is written: it is no fence

  constructor(root) {
    this.#root = root;
  }

  append(text) {
    for (const part of text.split(/(?<=\n)/)) {
      this.#held += part;
      const isFence = !this.#isInLine && /^ {0,3}```/.test(this.#held);
      const mayBecomeFence = !this.#isInLine && /^ {0,3}`{0,2}$/.test(this.#held);
      if (isFence ? part.endsWith("\n") : !mayBecomeFence) this.#release(isFence);
    }
  }

  finish() {
    this.#release(!this.#isInLine && /^ {0,3}```/.test(this.#held));
  }

  #release(isFence) {
    const text = this.#held;
    this.#held = "";
    if (isFence) {
      if (this.#node) this.#node.data = this.#node.data.trimEnd();
      this.#isCode = !this.#isCode;
      this.#node = null;
      this.#isInLine = false;
    } else if (text && (this.#node || text.trim() || this.#isCode)) {
      if (!this.#node) {
        this.#node = document.createTextNode("");
        this.#root.append(this.#isCode ? make("pre", "", make("code", "", this.#node)) : make("p", "", this.#node));
      }
      this.#node.appendData(text);
      this.#isInLine = !text.endsWith("\n");
    }
  }
}

/** One message of the user. `turn` is { text, attachments }. */
export function userView({ text, attachments }) {
  const view = make("article", "user");
  const heading = make("h3", "unseen");
  say(heading, "you");
  view.append(heading);
  for (const { name, text: document } of attachments) {
    const summary = make("summary");
    say(summary, "attachment", { name, size: document.length });
    // A long document is laid out only when somebody unfolds it.
    const details = make("details", "attached", summary, make("pre", "", document));
    view.append(details);
  }
  if (text) view.append(make("p", "", text));
  view.append(make("footer"));
  return view;
}

/** One reply, while it is written and after. Times are milliseconds of performance.now(). */
export class ReplyView {
  element = make("article", "reply");
  content = "";
  reasoning = "";
  #start = performance.now();
  #first = null; // the first text
  #last = null;
  #reasoned = null; // the end of the reasoning
  #waiting = make("p", "waiting");
  #summary = make("summary");
  #details = make("details", "reasoning", this.#summary);
  #answer = make("div", "answer");
  #footer = make("footer");
  #thought = new GrowingText(this.#details);
  #text = new GrowingText(this.#answer);
  #clock;

  constructor() {
    const heading = make("h3", "unseen");
    say(heading, "model");
    this.#details.hidden = true;
    this.#details.open = true;
    this.element.ariaBusy = "true";
    this.element.append(heading, this.#waiting, this.#details, this.#answer, this.#footer);
    this.#clock = setInterval(() => this.#tick(), 200);
    this.#tick();
  }

  #tick() {
    const seconds = Math.floor((performance.now() - this.#start) / 1000);
    if (this.#first === null) say(this.#waiting, "prefill", { seconds });
    else if (this.reasoning && this.#reasoned === null) say(this.#summary, "thinking", { seconds: Math.floor(this.#reasoningSeconds()) });
  }

  #reasoningSeconds() {
    return ((this.#reasoned ?? performance.now()) - this.#first) / 1000;
  }

  /** Take in one delta of the stream. */
  append({ reasoning_content: reasoning, content }) {
    if (!reasoning && !content) return;
    this.#last = performance.now();
    if (this.#first === null) {
      this.#first = this.#last;
      this.#waiting.remove();
    }
    if (reasoning) {
      this.reasoning += reasoning;
      this.#details.hidden = false;
      this.#thought.append(reasoning);
      this.#tick();
    }
    if (content) {
      this.content += content;
      if (this.reasoning && this.#reasoned === null) this.#endReasoning();
      this.#text.append(content);
    }
  }

  #endReasoning() {
    this.#reasoned = performance.now();
    this.#details.open = !this.content; // without an answer it is all there is
    say(this.#summary, "thought", { seconds: this.#reasoningSeconds() });
  }

  /** The stream is over. `usage` is the server's, null when it ended early; `buttons` go below the reply. */
  finish(usage, buttons) {
    clearInterval(this.#clock);
    this.#waiting.remove();
    this.#thought.finish();
    this.#text.finish();
    this.element.ariaBusy = "false";
    if (this.reasoning && this.#reasoned === null) this.#endReasoning();
    const reasoningTokens = usage?.completion_tokens_details?.reasoning_tokens;
    if (reasoningTokens) say(this.#summary, "thought_tokens", { tokens: reasoningTokens, seconds: this.#reasoningSeconds() });
    if (usage) {
      const line = make("p", "usage");
      const seconds = (this.#last - this.#first) / 1000;
      say(line, "usage", {
        prompt: usage.prompt_tokens,
        cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
        completion: usage.completion_tokens,
        rate: seconds > 0 ? (usage.completion_tokens - 1) / seconds : "–",
        first: this.#first === null ? "–" : (this.#first - this.#start) / 1000,
      });
      this.#footer.append(line);
    }
    this.#footer.append(...buttons);
  }

  /** A line of the page's own about this reply: why it ended. `detail` is the server's message. */
  remark(key, values = {}, detail = "", isProblem = false) {
    const line = make("p", isProblem ? "problem" : "remark");
    if (isProblem) line.role = "alert";
    const words = make("span");
    say(words, key, values);
    line.append(words);
    if (detail) line.append(make("q", "", detail));
    this.element.insertBefore(line, this.#footer);
  }
}
