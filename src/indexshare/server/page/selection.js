// What sparse attention read: byte ranges for each generated token and layer group, and what follows from them.

// Levels 1 to 5 of the display. One token: the share of layer groups that read a place, at least. The whole answer: the place
// is among this share of the prompt that was read most, so that there is a contrast whatever top-k and length are.
export const TOKEN_LEVELS = [0, 0.1, 0.25, 0.5, 0.8];
export const WHOLE_LEVELS = [1, 0.25, 0.1, 0.03, 0.01];

const NEAR = 100; // lit bytes that are closer than this are one place for "next" and "previous"

const encoder = new TextEncoder();

/** For each UTF-8 byte of `text` the UTF-16 offset of its character, and the length at the end. */
export function utf16Offsets(text) {
  const offsets = new Uint32Array(encoder.encode(text).length + 1);
  let byte = 0;
  for (let at = 0; at < text.length; ) {
    const code = text.codePointAt(at);
    const numBytes = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    offsets.fill(at, byte, byte + numBytes);
    byte += numBytes;
    at += code > 0xffff ? 2 : 1;
  }
  offsets[byte] = text.length;
  return offsets;
}

/** The selection of one reply, as it arrives. */
export class Recording {
  prompt = null; // { text, bytes, messages }
  layerGroups = []; // layers that share one selection: { indexer, layers }
  tokens = []; // { index, text, start, end, ranges }: start and end in bytes, ranges[group] is [start, end, start, end, ...] or null
  #offsets = null;

  /** Take in `indexshare.selected` of one chunk. */
  add(selected) {
    if (selected.prompt) {
      this.prompt = selected.prompt;
      this.layerGroups = selected.layer_groups;
      this.#offsets = utf16Offsets(selected.prompt.text);
    }
    for (const { index, text, ranges } of selected.tokens ?? []) {
      const start = this.tokens.at(-1)?.end ?? this.prompt.bytes;
      const flat = ranges.map((group) => group && Uint32Array.from(group.flat()));
      this.tokens.push({ index, text, start, end: start + encoder.encode(text).length, ranges: flat });
    }
  }

  /** Bytes of prompt and generated text together. */
  get numBytes() {
    return this.tokens.at(-1)?.end ?? this.prompt.bytes;
  }

  /** UTF-16 offsets in the prompt's text around the bytes [start, end); a character cut in two counts whole. */
  span(start, end) {
    const offsets = this.#offsets;
    while (offsets[end] === offsets[end - 1]) end++;
    return [offsets[start], offsets[end]];
  }

  /** The byte at which the character at UTF-16 offset `at` of the prompt starts. */
  byteAt(at) {
    let low = 0;
    let high = this.#offsets.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#offsets[middle] < at) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** What was read for one token (its place in `tokens`) or the whole answer (null), by one layer group or all (null). */
  reads(token, group) {
    const tokens = token === null ? this.tokens : [this.tokens[token]];
    const change = new Int32Array(this.numBytes + 1);
    let numReads = 0;
    let numSkipped = 0; // attended to everything: nothing was selected
    for (const { ranges } of tokens) {
      for (const flat of group === null ? ranges : [ranges[group]]) {
        if (!flat) {
          numSkipped++;
          continue;
        }
        numReads++;
        for (let i = 0; i < flat.length; i += 2) {
          change[flat[i]]++;
          change[flat[i + 1]]--;
        }
      }
    }
    const whole = () => countsOfShares(change.subarray(0, this.prompt.bytes), numReads);
    const limits = token === null ? whole() : TOKEN_LEVELS.map((share) => Math.max(1, share * numReads));
    return { segments: segmentsOf(change, limits), numReads, numSkipped };
  }
}

/** For each of WHOLE_LEVELS the least count of reads that at most this share of the bytes has. */
function countsOfShares(change, numReads) {
  const numBytesOf = new Uint32Array(numReads + 1); // by count
  let count = 0;
  for (const step of change) numBytesOf[(count += step)]++;
  return WHOLE_LEVELS.map((share) => {
    let least = numReads + 1;
    for (let numBytes = 0; least > 1 && (numBytes += numBytesOf[least - 1]) <= share * change.length; ) least--;
    return least;
  });
}

/** Runs of bytes with one level, ascending: { start, end, level }. `change`: by how much the count of reads changes. */
function segmentsOf(change, limits) {
  const segments = [];
  let count = 0;
  let level = 0;
  let start = 0;
  for (let byte = 0; byte < change.length; byte++) {
    if (change[byte] === 0) continue;
    count += change[byte];
    const next = limits.findLastIndex((least) => count >= least) + 1;
    if (next === level) continue;
    if (level) segments.push({ start, end: byte, level });
    level = next;
    start = byte;
  }
  return segments;
}

/** Places to jump between: segments of at least `level` before byte `limit`, those close together as one. */
export function placesOf(segments, level, limit) {
  const places = [];
  for (const segment of segments) {
    if (segment.level < level || segment.start >= limit) continue;
    const last = places.at(-1);
    const end = Math.min(segment.end, limit);
    if (last && segment.start - last.end < NEAR) last.end = end;
    else places.push({ start: segment.start, end });
  }
  return places;
}

/** The layers of a group in few characters: [2, 3, 4, 5, 9] is "2–5, 9". */
export function layersText(layers) {
  const runs = [];
  for (const layer of layers) {
    if (runs.length && layer === runs.at(-1)[1] + 1) runs.at(-1)[1] = layer;
    else runs.push([layer, layer]);
  }
  return runs.map(([first, last]) => (first === last ? `${first}` : `${first}–${last}`)).join(", ");
}
