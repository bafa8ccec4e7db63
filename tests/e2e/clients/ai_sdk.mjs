// Vercel's `ai` with @ai-sdk/openai-compatible as its users use it.  Python says what to ask and
// judges what comes.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, streamObject, streamText } from "ai";
import { z } from "zod";

import { abortable, serve } from "./commands.mjs";

const Weather = z.object({ city: z.string(), degrees: z.number() });
const talks = new Map(); // the conversations: what a chat window holds, and nothing else

const commands = {
  // `call` is what the user passes to the SDK beside the model.
  generate: ({ url, options, model, call, name }) =>
    abortable(name, async (abortSignal) => {
      const result = await generateText({
        model: provider(url, options)(model),
        maxRetries: 0,
        abortSignal,
        ...call,
      });
      return {
        text: result.text,
        reasoning: result.reasoningText,
        finish_reason: result.finishReason,
        usage: result.usage,
        metadata: result.providerMetadata,
        response: { id: result.response.id, model: result.response.modelId },
        tool_calls: result.toolCalls,
        warnings: result.warnings,
      };
    }),

  // Every part of a stream, and what the caller was told of errors; may `leave` at its first text.
  async stream({ url, options, model, call, leave }) {
    const controller = new AbortController();
    const errors = [];
    const result = streamText({
      model: provider(url, options)(model),
      maxRetries: 0,
      abortSignal: controller.signal,
      onError: ({ error }) => errors.push(error.message),
      ...call,
    });
    const parts = [];
    for await (const part of result.fullStream) {
      const { error } = part;
      parts.push(error ? { ...part, error: { message: error.message, ...describe(error) } } : part);
      if (leave && part.type === "text-delta") controller.abort();
    }
    return { parts, errors };
  },

  // An object by each of the ways that the SDK has.
  async object({ url, options, model, call, how }) {
    const asked = { model: provider(url, options)(model), maxRetries: 0, ...call };
    if (how === "generateObject") {
      return { object: (await generateObject({ ...asked, schema: Weather })).object };
    }
    if (how === "streamObject") {
      const result = streamObject({ ...asked, schema: Weather });
      const partial = [];
      for await (const object of result.partialObjectStream) partial.push(object);
      return { object: await result.object, partial };
    }
    if (how === "no-schema") {
      return { object: (await generateObject({ ...asked, output: "no-schema" })).object };
    }
    const output = Output.object({ schema: Weather });
    return { object: (await generateText({ ...asked, output })).output };
  },

  // The next message of a conversation.  The whole of it is sent, with the answers as the SDK keeps
  // them: reasoning goes back to the server, too.
  async say({ url, key, headers, talk, text, streamed }) {
    if (!talks.has(talk)) talks.set(talk, []);
    const messages = talks.get(talk);
    messages.push({ role: "user", content: text });
    const model = provider(url, { apiKey: key, headers })("claude-code");
    const asked = { model, maxRetries: 0, messages };
    const result = streamed
      ? streamText({ ...asked, onError: () => {} })
      : await generateText(asked);
    const answer = await result.text;
    messages.push(...(await result.response).messages);
    return { text: answer, session: (await result.providerMetadata).claude.session_id };
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

// Passes on what the server tells in the `claude` object, which the SDK does not know.
const metadataExtractor = {
  extractMetadata: async ({ parsedBody }) => ({ claude: parsedBody.claude }),
  createStreamExtractor() {
    let claude;
    return {
      processChunk: (chunk) => (claude = chunk?.claude ?? claude),
      buildMetadata: () => ({ claude }),
    };
  },
};

function provider(url, options) {
  return createOpenAICompatible({
    name: "proxy",
    baseURL: `${url}/v1`,
    apiKey: "any",
    includeUsage: true,
    supportsStructuredOutputs: true,
    metadataExtractor,
    ...options,
  });
}

function describe({ name, statusCode, isRetryable, data, type, code, param }) {
  return { name, status: statusCode, retryable: isRetryable, data, type, code, param };
}

await serve(commands, describe);
