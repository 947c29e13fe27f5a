// node anthropic.mjs SCENARIO: one conversation through the official client, its outcome as one line of JSON.
// BASE_URL: the server. API_KEY: any, unless the server wants one.
import Anthropic from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { z } from "zod";

const options = { baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY, maxRetries: 0, timeout: 60_000 };
const client = new Anthropic(options);
const model = "nano";
const hello = [{ role: "user", content: "Hello, who are you?" }];
const question = [{ role: "user", content: "What is the weather in Oslo for 3 days?" }];
const weather = z.object({ city: z.string().max(20), days: z.number().int().min(1).max(9) });
const tool = {
  name: "get_weather",
  description: "The weather of a city",
  input_schema: {
    type: "object",
    properties: { city: { type: "string", maxLength: 20 }, days: { type: "integer", minimum: 1, maximum: 9 } },
    required: ["city", "days"],
    additionalProperties: false,
  },
};

async function failure(call) {
  try {
    await call();
    return { kind: "none" };
  } catch (error) {
    const { status, type, message, requestID } = error;
    return { kind: error.constructor.name, status, type, message, requestID };
  }
}

async function runTools(extra) {
  const seen = [];
  const run = (input) => {
    seen.push(input);
    return '{"celsius": 7}';
  };
  const tools = [betaZodTool({ name: "get_weather", description: "The weather", inputSchema: weather, run })];
  const request = { model, max_tokens: 300, messages: question, tools, tool_choice: { type: "any" } };
  const reasons = [];
  for await (const message of client.beta.messages.toolRunner({ ...request, max_iterations: 2, ...extra })) {
    reasons.push(message.stop_reason);
  }
  return { seen, reasons };
}

const scenarios = {
  async messages() {
    const request = { model, max_tokens: 60, temperature: 0, messages: hello, system: "Be brief." };
    const whole = await client.messages.create(request);
    const stream = client.messages.stream(request);
    const kinds = [];
    let text = "";
    stream.on("text", (delta) => (text += delta));
    for await (const event of stream) kinds.push(event.type);
    const streamed = await stream.finalMessage();
    const counted = await client.messages.countTokens({ model, messages: hello, system: "Be brief." });
    return { whole, streamed, text, kinds, counted };
  },

  async tools() {
    const request = { model, max_tokens: 300, tools: [tool] };
    const choice = { type: "tool", name: "get_weather" };
    const first = await client.messages.create({ ...request, messages: question, tool_choice: choice });
    const results = first.content
      .filter((block) => block.type === "tool_use")
      .map((block) => ({ type: "tool_result", tool_use_id: block.id, content: '{"celsius": 7}' }));
    const messages = [
      ...question,
      { role: "assistant", content: first.content },
      { role: "user", content: results },
    ];
    const last = await client.messages.create({ ...request, messages, tool_choice: { type: "none" } });
    const stream = client.messages.stream({ ...request, messages: question, tool_choice: { type: "any" } });
    return { first, last, streamed: await stream.finalMessage() };
  },

  // By default the runner asks for a thread that the server stores, and goes on without when that is refused by code.
  async runner() {
    return runTools({});
  },

  async runner_without_thread() {
    return runTools({ thread: false });
  },

  async structured() {
    // The helper takes bounds out of the schema, and nano does not stop counting by itself.
    const answer = z.object({ mood: z.enum(["good", "bad"]), sure: z.boolean() });
    const output_config = { format: zodOutputFormat(answer) };
    const parsed = await client.messages.parse({ model, max_tokens: 800, messages: hello, output_config });
    return { parsed: parsed.parsed_output };
  },

  async thinking() {
    const request = { model, max_tokens: 200, thinking: { type: "enabled", budget_tokens: 64 } };
    const first = await client.messages.create({ ...request, messages: hello });
    const messages = [
      ...hello,
      { role: "assistant", content: first.content },
      { role: "user", content: "And now?" },
    ];
    const second = await client.messages.create({ ...request, messages });
    const adaptive = { thinking: { type: "adaptive" }, output_config: { effort: "high" } };
    const third = client.messages.stream({ ...request, ...adaptive, messages });
    return { first, second, third: await third.finalMessage() };
  },

  async errors() {
    const create = (extra) => () => client.messages.create({ model, max_tokens: 9, messages: hello, ...extra });
    const image = { type: "image", source: { type: "url", url: "https://example.org/a.png" } };
    return {
      unknown_field: await failure(create({ colour: "red" })),
      bad_value: await failure(create({ temperature: -1 })),
      unknown_model: await failure(create({ model: "other" })),
      image: await failure(create({ messages: [{ role: "user", content: [image] }] })),
    };
  },

  async key() {
    return { outcome: await failure(() => client.messages.countTokens({ model, messages: hello })) };
  },

  async cancel() {
    const schema = { type: "string", minLength: 3990, maxLength: 4000, pattern: "^[a-z ]*$" };
    const endless = { model, max_tokens: 4000, messages: hello, output_config: { format: { type: "json_schema", schema } } };
    const stream = client.messages.stream(endless);
    let events = 0;
    const outcome = await failure(async () => {
      for await (const _ of stream) {
        events += 1;
        if (events === 5) stream.abort();
      }
    });
    const timed = new Anthropic({ ...options, timeout: 300 });
    const slow = await failure(() => timed.messages.create(endless));
    return { events, outcome, slow };
  },
};

console.log(JSON.stringify(await scenarios[process.argv[2]]()));
