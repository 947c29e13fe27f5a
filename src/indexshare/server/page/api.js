// The server over HTTP: server-sent events in, chunks out; every failure is a Failure that says what to do.

/** Something went wrong. `key` and `values` are for i18n's t(); `detail` is the server's own message, in English. */
export class Failure extends Error {
  constructor(key, { values = {}, detail = "", status = 0 } = {}) {
    super(detail || key);
    Object.assign(this, { key, values, detail, status });
  }
}

async function call(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  try {
    return await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("error_offline");
  }
}

async function failureOf(response) {
  const status = response.status;
  const error = (await response.json().catch(() => ({}))).error ?? {};
  const detail = error.message ?? "";
  if (status === 401) return new Failure("error_key", { status, detail });
  if (status === 429) {
    return new Failure("error_busy", { status, detail, values: { seconds: Number(response.headers.get("retry-after") ?? 1) } });
  }
  if (error.code === "context_length_exceeded" || status === 413) return new Failure("error_context", { status, detail });
  if (status < 500) return new Failure("error_request", { status, detail });
  return new Failure("error_server", { status, detail, values: { request: response.headers.get("x-request-id") ?? "?" } });
}

/** null when the model can answer, else the reason why it cannot yet. */
export async function whyNotReady(key) {
  const response = await call("/ready", key);
  if (response.ok) return null;
  if (response.status !== 503) throw await failureOf(response);
  return (await response.json().catch(() => ({}))).reason ?? "…";
}

/** The first model of /v1/models: { id, max_model_len }. */
export async function getModel(key) {
  const response = await call("/v1/models", key);
  if (!response.ok) throw await failureOf(response);
  return (await response.json()).data[0];
}

/** The chunks of a streamed chat completion. Ends with a Failure when the stream does not end as it should. */
export async function* streamChat(body, key, signal) {
  const response = await call("/v1/chat/completions", key, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await failureOf(response);
  for await (const data of eventsOf(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) {
      const values = { request: response.headers.get("x-request-id") ?? "?" };
      throw new Failure("error_server", { status: 500, detail: chunk.error.message, values });
    }
    yield chunk;
  }
  throw new Failure("error_offline");
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("error_offline");
    }
    if (part.done) return;
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    // Our server writes each event as one data line; comment lines keep the connection alive.
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}
