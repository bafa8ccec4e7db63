// The openai package as its users use it.  Python says what to ask and judges what comes.

import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

import { abortable, classes, serve } from "./commands.mjs";

const talks = new Map(); // the conversations: what a chat window holds, and nothing else

const commands = {
  // One request; `body` is what the user passes to the SDK, `options` are those of the client.
  create: ({ url, options, body, name }) =>
    abortable(name, async (signal) => {
      const { data, request_id } = await client(url, options)
        .chat.completions.create(body, { signal })
        .withResponse();
      return { completion: data, request_id };
    }),

  // Every chunk of a stream, and the error that ended it, if one did.
  async stream({ url, options, body }) {
    const stream = await client(url, options).chat.completions.create({ ...body, stream: true });
    const chunks = [];
    try {
      for await (const chunk of stream) chunks.push(chunk);
    } catch (error) {
      return { chunks, error: { is: classes(error), message: error.message, ...describe(error) } };
    }
    return { chunks };
  },

  // The `.stream()` helper: what its listeners hear, and the completion that it puts together.
  async helper({ url, options, body }) {
    const stream = client(url, options).chat.completions.stream(body);
    const heard = { content: [], errors: 0, ends: 0 };
    stream.on("content", (delta) => heard.content.push(delta));
    stream.on("error", () => (heard.errors += 1));
    stream.on("end", () => (heard.ends += 1));
    const completion = await stream.finalChatCompletion();
    return { completion, heard };
  },

  // An answer in the form of a zod schema, whole or by the helper for streams.
  async parse({ url, options, body, streamed }) {
    const Weather = z.object({ city: z.string(), degrees: z.number() });
    const asked = { ...body, response_format: zodResponseFormat(Weather, "weather") };
    const completions = client(url, options).chat.completions;
    const completion = streamed
      ? await completions.stream(asked).finalChatCompletion()
      : await completions.parse(asked);
    return completion.choices[0].message;
  },

  // Leaves a stream at its first text: by a signal, by the stream's controller, or by `break`.
  async leave({ url, options, body, how }) {
    const controller = new AbortController();
    const stream = await client(url, options).chat.completions.create(
      { ...body, stream: true },
      { signal: controller.signal },
    );
    let text = "";
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      if (text === "") continue;
      if (how === "break") break;
      (how === "signal" ? controller : stream.controller).abort();
    }
    return { text };
  },

  async models({ url, options }) {
    const models = [];
    for await (const model of client(url, options).models.list()) models.push(model);
    return { models };
  },

  async model({ url, options, name }) {
    return { model: await client(url, options).models.retrieve(name) };
  },

  // The next message of a conversation.  The whole of it is sent, as chat windows do.
  async say({ url, key, headers, talk, text, streamed }) {
    if (!talks.has(talk)) talks.set(talk, []);
    const messages = talks.get(talk);
    messages.push({ role: "user", content: text });
    const completions = client(url, { apiKey: key, defaultHeaders: headers }).chat.completions;
    const body = { model: "claude-code", messages };
    const completion = streamed
      ? await completions.stream(body).finalChatCompletion()
      : await completions.create(body);
    const [{ message }] = completion.choices;
    messages.push(message);
    return { text: message.content, session: completion.claude.session_id };
  },

  async copy({ talk, to }) {
    talks.set(to, structuredClone(talks.get(talk)));
    return {};
  },

  // The user changes what an earlier message says.
  async edit({ talk, at, text }) {
    talks.get(talk)[at].content = text;
    return {};
  },

  // The user goes back: this message and all after it are gone.
  async cut({ talk, at }) {
    talks.get(talk).splice(at);
    return {};
  },
};

function client(url, options) {
  return new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0, ...options });
}

function describe({ status, code, type, param, requestID, headers }) {
  const retry_after = headers?.get("retry-after");
  return { status, code, type, param, request_id: requestID, retry_after };
}

await serve(commands, describe);
