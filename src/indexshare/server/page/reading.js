// The panel "What the model read": the prompt as one text, lit by the CSS Custom Highlight API (no element per token of the
// prompt, so that a prompt of any length stays quick), and below it the generated tokens, one element each.

import { say, t } from "./i18n.js";
import { Minimap } from "./minimap.js";
import { layersText, placesOf, TOKEN_LEVELS, WHOLE_LEVELS } from "./selection.js";

const CHUNK = 2048; // UTF-16 units of one text node: short nodes keep painting quick and give the minimap its scale
const REFRESH = 300; // ms between two pictures of the whole answer while it is being written

const element = (name) => document.getElementById(`reading-${name}`);

export class ReadingPanel {
  #recording = null;
  #group = null; // layer group, null: all
  #pinned = null; // token that stays when the pointer leaves, null: the whole answer
  #token = null; // what is shown now
  #focused = 0; // the token that the Tab key reaches
  #chunks = []; // { node, start, top }: text nodes with their UTF-16 offset and place
  #lit = []; // token elements that are lit
  #places = [];
  #place = -1;
  #timer = null;
  #text = element("text");
  #tokens = element("tokens");
  #map = new Minimap(element("map"), element("text"));
  #highlights = [];

  constructor() {
    if (globalThis.Highlight) {
      this.#highlights = TOKEN_LEVELS.map(() => new Highlight());
      this.#highlights.forEach((highlight, i) => CSS.highlights.set(`level-${i + 1}`, highlight));
      CSS.highlights.set("frame", (this.frame = new Highlight()));
      CSS.highlights.set("here", (this.here = new Highlight()));
      this.frame.priority = -1;
    }
    element("group").addEventListener("change", (event) => {
      this.#group = event.target.value === "" ? null : Number(event.target.value);
      this.#show();
    });
    element("message").addEventListener("change", (event) => this.#scrollTo(Number(event.target.value), "start"));
    element("next").addEventListener("click", () => this.#step(1));
    element("previous").addEventListener("click", () => this.#step(-1));
    element("whole").addEventListener("click", () => this.#pin(null));
    this.#text.addEventListener("click", (event) => this.#clicked(event));
    this.#tokens.addEventListener("pointerover", (event) => this.#preview(event.target.token ?? this.#pinned));
    this.#tokens.addEventListener("pointerleave", () => this.#preview(this.#pinned));
    this.#tokens.addEventListener("click", (event) => event.target.token !== undefined && this.#pin(event.target.token));
    this.#tokens.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.#measure()).observe(this.#text);
  }

  /** Show `recording` from now on (null: none); `finished`: nothing will be added to it. */
  open(recording, finished) {
    this.#recording = recording;
    this.#pinned = this.#token = null;
    this.#focused = 0;
    this.#tokens.replaceChildren();
    this.#text.replaceChildren();
    this.#chunks = [];
    this.update(finished);
  }

  /** The recording has grown; `finished`: for the last time. */
  update(finished = false) {
    const recording = this.#recording;
    const isEmpty = !recording?.prompt;
    element("body").hidden = isEmpty;
    element("empty").hidden = !isEmpty;
    if (isEmpty) return say(element("empty"), recording && finished ? "reading_missing" : "reading_empty");
    if (!this.#chunks.length) this.#showPrompt();
    this.#addTokens();
    if (finished) return this.#show();
    this.#timer ??= setTimeout(() => this.#show(), REFRESH);
  }

  /** Write everything again that depends on the language. */
  relabel() {
    if (!this.#recording?.prompt) return;
    this.#fillSelects();
    this.#show();
  }

  #showPrompt() {
    const { text, messages } = this.#recording.prompt;
    for (let start = 0; start < text.length; ) {
      let end = Math.min(start + CHUNK, text.length);
      if ((text.charCodeAt(end - 1) & 0xfc00) === 0xd800) end++; // do not cut a surrogate pair
      const node = document.createTextNode(text.slice(start, end));
      const span = document.createElement("span");
      span.append(node);
      this.#text.append(span);
      this.#chunks.push({ node, start, top: 0 });
      start = end;
    }
    this.#text.scrollTop = 0;
    this.#fillSelects();
    this.frame?.clear();
    let before = 0;
    for (const { start, end } of [...messages, { start: this.#recording.prompt.bytes }]) {
      if (start > before) for (const range of this.#ranges(before, start)) this.frame?.add(range);
      before = end;
    }
    this.#measure();
  }

  #fillSelects() {
    const { layerGroups, prompt } = this.#recording;
    const layers = layerGroups.map((group, i) => new Option(layersText(group.layers), i));
    element("group").replaceChildren(new Option(t("all_layers"), ""), ...layers);
    element("group").value = this.#group !== null && this.#group < layerGroups.length ? this.#group : "";
    if (element("group").value === "") this.#group = null;
    const messages = prompt.messages.map(({ role, index, start }) => new Option(t("message", { role, number: index + 1 }), start));
    element("message").replaceChildren(new Option(t("start"), 0), ...messages);
  }

  #addTokens() {
    const tokens = this.#recording.tokens;
    const isAtEnd = this.#tokens.scrollTop + this.#tokens.clientHeight > this.#tokens.scrollHeight - 30;
    for (let i = this.#tokens.childElementCount; i < tokens.length; i++) {
      const span = document.createElement("span");
      span.token = i;
      span.role = "option";
      span.tabIndex = i === this.#focused ? 0 : -1;
      span.ariaSelected = "false";
      span.textContent = tokens[i].text.replaceAll("\n", "↵\n") || "·"; // "·": a part of a character
      this.#tokens.append(span);
    }
    if (isAtEnd) this.#tokens.scrollTop = this.#tokens.scrollHeight;
  }

  #preview(token) {
    if (token === this.#token) return;
    this.#token = token;
    this.#show();
  }

  /** Keep `token` shown; brings its first place into view. */
  #pin(token) {
    this.#pinned = this.#token = token;
    this.#show();
    if (token === null) return;
    this.#tokens.children[this.#focused].tabIndex = -1;
    this.#focused = token;
    this.#tokens.children[token].tabIndex = 0;
    this.#tokens.children[token].focus();
    const { scrollTop, clientHeight } = this.#text;
    const tops = this.#places.map((place) => this.#topOf(place.start));
    if (tops.length && !tops.some((top) => top > scrollTop && top < scrollTop + clientHeight - 20)) this.#step(1);
  }

  #key(event) {
    const last = this.#recording.tokens.length - 1;
    const moves = { ArrowRight: this.#focused + 1, ArrowLeft: this.#focused - 1, Home: 0, End: last };
    if (event.key in moves) this.#pin(Math.max(0, Math.min(last, moves[event.key])));
    else if (event.key === "Enter" || event.key === " ") this.#pin(this.#focused);
    else if (event.key === "Escape") this.#pin(null);
    else return;
    event.preventDefault();
  }

  /** Light what was read for the token that is shown, or for the whole answer. */
  #show() {
    clearTimeout(this.#timer);
    this.#timer = null;
    const { prompt, tokens } = this.#recording;
    const { segments, numReads, numSkipped } = this.#recording.reads(this.#token, this.#group);
    for (const highlight of this.#highlights) highlight.clear();
    for (const { start, end, level } of segments) {
      if (start >= prompt.bytes) break;
      for (const range of this.#ranges(start, Math.min(end, prompt.bytes))) this.#highlights[level - 1]?.add(range);
    }
    // Each token reads those just before it: over the whole answer that says nothing, and would outshine the prompt.
    this.#lightTokens(this.#token === null ? [] : segments);
    this.#places = placesOf(segments, this.#token === null ? 4 : 1, prompt.bytes);
    this.#select(-1);
    this.#drawMap(segments);
    this.#note(segments, numReads, numSkipped);
    this.#legend();
    element("whole").ariaPressed = String(this.#token === null);
    for (const chosen of this.#tokens.querySelectorAll("[aria-selected=true]")) chosen.ariaSelected = "false";
    if (this.#token !== null && tokens.length) this.#tokens.children[this.#token].ariaSelected = "true";
  }

  #note(segments, numReads, numSkipped) {
    const note = element("note");
    const token = this.#recording.tokens[this.#token];
    if (!this.#highlights.length) return say(note, "no_highlights");
    if (!numReads && numSkipped) return say(note, "note_everything");
    if (token) {
      const before = segments.reduce((sum, { start, end }) => sum + end - start, 0);
      const share = (100 * before) / token.start;
      const text = JSON.stringify(token.text);
      say(note, "note_token", { number: this.#token + 1, text, share, total: this.#places.length });
    } else {
      say(note, "note_whole", { tokens: this.#recording.tokens.length });
    }
    if (numSkipped) note.append(` ${t("note_partly", { skipped: numSkipped, total: numReads + numSkipped })}`);
  }

  #legend() {
    const isWhole = this.#token === null;
    say(element("legend"), isWhole ? "legend_whole" : "legend_token");
    const swatches = document.querySelectorAll(".swatch");
    element("legend").parentElement.style.visibility = isWhole || this.#group === null ? "" : "hidden"; // read or not
    (isWhole ? WHOLE_LEVELS : TOKEN_LEVELS).forEach((share, i) => say(swatches[i], i ? "percent" : "any", { share: 100 * share }));
  }

  #lightTokens(segments) {
    for (const span of this.#lit) span.className = "";
    this.#lit = [];
    const tokens = this.#recording.tokens;
    let i = 0;
    for (const { start, end, level } of segments) {
      while (i < tokens.length && tokens[i].end <= start) i++;
      for (let j = i; j < tokens.length && tokens[j].start < end; j++) {
        this.#tokens.children[j].className = `level-${level}`;
        this.#lit.push(this.#tokens.children[j]);
      }
    }
  }

  #drawMap(segments) {
    const height = this.#text.scrollHeight;
    const line = parseFloat(getComputedStyle(this.#text).lineHeight) / height;
    const share = (byte) => this.#topOf(byte) / height;
    const limit = this.#recording.prompt.bytes;
    this.#map.marks = segments
      .filter(({ start }) => start < limit)
      .map(({ start, end, level }) => [share(start), Math.max(share(Math.min(end, limit)), share(start) + line / 2), level]);
  }

  /** Where the chunks lie; needed again whenever lines break elsewhere. */
  #measure() {
    if (!this.#chunks.length || !this.#text.clientHeight) return;
    const origin = this.#text.getBoundingClientRect().top - this.#text.scrollTop;
    for (const chunk of this.#chunks) chunk.top = chunk.node.parentElement.getClientRects()[0].top - origin;
    this.#show();
  }

  /** About where byte `start` of the prompt lies, in pixels from the top of the text. */
  #topOf(start) {
    const [at] = this.#recording.span(start, start);
    const i = Math.min(Math.floor(at / CHUNK), this.#chunks.length - 1);
    const next = this.#chunks[i + 1]?.top ?? this.#text.scrollHeight;
    return this.#chunks[i].top + ((at - this.#chunks[i].start) / CHUNK) * (next - this.#chunks[i].top);
  }

  /** The bytes [start, end) of the prompt as ranges of the document, one for each text node. */
  #ranges(start, end) {
    const [from, to] = this.#recording.span(start, end);
    const ranges = [];
    for (let i = Math.max(0, Math.floor(from / CHUNK) - 1); i < this.#chunks.length && this.#chunks[i].start < to; i++) {
      const { node, start: first } = this.#chunks[i];
      if (first + node.length <= from) continue;
      const startOffset = Math.max(0, from - first);
      const endOffset = Math.min(node.length, to - first);
      ranges.push(new StaticRange({ startContainer: node, startOffset, endContainer: node, endOffset }));
    }
    return ranges;
  }

  #step(by) {
    if (!this.#places.length) return;
    const start = this.#place < 0 && by < 0 ? 0 : this.#place;
    this.#select((start + by + this.#places.length) % this.#places.length);
    this.#scrollTo(this.#places[this.#place].start, "center");
  }

  /** Make `place` the current one (-1: none). */
  #select(place) {
    this.#place = place;
    this.here?.clear();
    const total = this.#places.length;
    if (place < 0) return say(element("place"), "places", { total });
    for (const range of this.#ranges(this.#places[place].start, this.#places[place].end)) this.here?.add(range);
    say(element("place"), "place", { number: place + 1, total });
  }

  #scrollTo(byte, where) {
    const [range] = this.#ranges(byte, byte + 1);
    if (!range) return;
    const live = document.createRange(); // only a live range knows where it is on the screen
    live.setStart(range.startContainer, range.startOffset);
    live.setEnd(range.endContainer, range.endOffset);
    const pane = this.#text.getBoundingClientRect();
    const margin = where === "center" ? pane.height / 2 : 12;
    this.#text.scrollTop += live.getBoundingClientRect().top - pane.top - margin;
  }

  /** A click on a lit place makes it the current one. */
  #clicked(event) {
    const caret = document.caretPositionFromPoint?.(event.clientX, event.clientY);
    const chunk = caret && this.#chunks.find(({ node }) => node === caret.offsetNode);
    if (!chunk) return;
    const byte = this.#recording.byteAt(chunk.start + caret.offset);
    const place = this.#places.findIndex(({ start, end }) => start <= byte && byte <= end);
    if (place >= 0) this.#select(place);
  }
}
