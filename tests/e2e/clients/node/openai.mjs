// node openai.mjs SCENARIO: one conversation through the official client, its outcome as one line of JSON.
// BASE_URL: the server without /v1. API_KEY: any, unless the server wants one.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const baseURL = `${process.env.BASE_URL}/v1`;
const client = new OpenAI({ baseURL, apiKey: process.env.API_KEY, maxRetries: 0, timeout: 60_000 });
const model = "nano";
const hello = [{ role: "user", content: "Hello, who are you?" }];
const question = [{ role: "user", content: "What is the weather in Oslo for 3 days?" }];
const weather = z.object({ city: z.string().max(20), days: z.number().int().min(1).max(9) });
const answer = z.object({ answer: z.number().int().min(0).max(999), sure: z.boolean() });

async function failure(call) {
  try {
    await call();
    return { kind: "none" };
  } catch (error) {
    const { status, param, code, type, message, requestID } = error;
    return { kind: error.constructor.name, status, param, code, type, message, requestID };
  }
}

function results(response) {
  return response.output
    .filter((item) => item.type === "function_call")
    .map((item) => ({ type: "function_call_output", call_id: item.call_id, output: '{"celsius": 7}' }));
}

const scenarios = {
  async chat() {
    const request = { model, messages: hello, temperature: 0, max_completion_tokens: 60 };
    const whole = await client.chat.completions.create({ ...request, logprobs: true, top_logprobs: 2 });
    const helper = client.chat.completions.stream({ ...request, stream_options: { include_usage: true } });
    let [text, chunks] = ["", 0];
    for await (const chunk of helper) {
      chunks += 1;
      text += chunk.choices[0]?.delta?.content ?? "";
    }
    const streamed = await helper.finalChatCompletion();
    const legacy = await client.completions.create({ model, prompt: "import os", max_tokens: 4, logprobs: 1, echo: true });
    const models = [];
    for await (const item of client.models.list()) models.push(item.id);
    return { whole, streamed, text, chunks, legacy: legacy.choices[0], models };
  },

  async tools() {
    const tools = [zodFunction({ name: "get_weather", description: "The weather of a city", parameters: weather })];
    const first = await client.chat.completions.parse({ model, messages: question, tools, tool_choice: "required" });
    const message = first.choices[0].message;
    const messages = [
      ...question,
      message,
      ...message.tool_calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: '{"celsius": 7}' })),
    ];
    const last = await client.chat.completions.create({ model, messages, tools, tool_choice: "none" });
    const stream = client.chat.completions.stream({ model, messages: question, tools, tool_choice: "required" });
    const streamed = await stream.finalMessage();
    return { reason: first.choices[0].finish_reason, calls: message.tool_calls, last: last.choices[0], streamed };
  },

  async structured() {
    const format = zodResponseFormat(answer, "answer");
    const chat = await client.chat.completions.parse({ model, messages: hello, response_format: format });
    const text = { format: zodTextFormat(answer, "answer") };
    const response = await client.responses.parse({ model, input: "How many?", text });
    return { chat: chat.choices[0].message.parsed, response: response.output_parsed };
  },

  async reasoning() {
    const request = { model, messages: hello, max_completion_tokens: 60 };
    const thinking = await client.chat.completions.create({ ...request, reasoning_effort: "high" });
    const plain = await client.chat.completions.create({ ...request, reasoning_effort: "none" });
    return { thinking: thinking.choices[0].message, plain: plain.choices[0].message, usage: thinking.usage };
  },

  async responses() {
    const reasoning = { effort: "high" };
    const tools = [zodResponsesFunction({ name: "get_weather", parameters: weather })];
    const request = { model, tools, reasoning };
    const first = await client.responses.create({ ...request, input: question, tool_choice: "required" });
    const input = [...question, ...first.output, ...results(first)];
    const stream = client.responses.stream({ ...request, input, tool_choice: "none" });
    const kinds = [];
    for await (const event of stream) kinds.push(event.type);
    const last = await stream.finalResponse();
    return { first: first.output, kinds, last: { status: last.status, text: last.output_text, usage: last.usage } };
  },

  // The client adds fields of its own to what it has parsed, and sends them back.
  async responses_parsed() {
    const tools = [zodResponsesFunction({ name: "get_weather", parameters: weather })];
    const format = { format: zodTextFormat(answer, "answer") };
    const call = await client.responses.parse({ model, input: question, tools, tool_choice: "required" });
    const input = [...question, ...call.output, ...results(call)];
    const text = await client.responses.parse({ model, input, text: format });
    const next = [...input, ...text.output, ...hello];
    const last = await client.responses.create({ model, input: next });
    return { status: last.status, parsed: text.output_parsed };
  },

  async errors() {
    const create = (extra) => () => client.chat.completions.create({ model, messages: hello, ...extra });
    return {
      unknown_field: await failure(create({ colour: "red" })),
      bad_value: await failure(create({ temperature: -1 })),
      unknown_model: await failure(create({ model: "other" })),
      responses_model: await failure(() => client.responses.create({ model: "other", input: "hello" })),
      no_such_path: await failure(() => client.embeddings.create({ model, input: "hello" })),
    };
  },

  async key() {
    return { outcome: await failure(() => client.models.list()) };
  },

  async cancel() {
    const abort = new AbortController();
    // As long as it is allowed to be: nothing but letters, far more than are waited for.
    const request = { model, messages: hello, stream: true, max_completion_tokens: 4000 };
    const endless = { ...request, reasoning_effort: "none", structured_outputs: { regex: "[a-z ]{3990,}" } };
    const stream = await client.chat.completions.create(endless, { signal: abort.signal });
    let chunks = 0;
    for await (const _ of stream) {
      chunks += 1;
      if (chunks === 5) abort.abort();
    }
    const timed = new OpenAI({ baseURL, apiKey: process.env.API_KEY, maxRetries: 0, timeout: 300 });
    const slow = await failure(() => timed.chat.completions.create({ ...endless, stream: false }));
    return { chunks, slow };
  },
};

console.log(JSON.stringify(await scenarios[process.argv[2]]()));
