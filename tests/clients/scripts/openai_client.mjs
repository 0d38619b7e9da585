// OpenAI's client for JavaScript: prints what it got as JSON.
import OpenAI from "openai";

const [url, image] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const text = { type: "text", text: "What is shown?" };
const picture = { type: "image_url", image_url: { url: image } };
const ask = (content, more = {}) =>
  client.chat.completions.create({ model: "tiny", messages: [{ role: "user", content }], max_tokens: 8, ...more });

const found = {};
found.text = (await ask([text])).choices[0].message.content;
found.image = (await ask([picture, text])).choices[0].message.content;
found.images = (await ask([picture, picture, text])).choices[0].message.content;
found.stream = "";
for await (const chunk of await ask([picture, text], { stream: true, stream_options: { include_usage: true } })) {
  found.stream += chunk.choices[0]?.delta?.content ?? "";
  found.usage = chunk.usage?.completion_tokens ?? found.usage;
}
const hot = { n: 2, temperature: 1, seed: 7 };
found.several = (await ask([text], hot)).choices.map((choice) => choice.message.content);
found.again = (await ask([text], hot)).choices.map((choice) => choice.message.content);
found.stopped = (await ask([text], { stop: [found.text.trim()[2]] })).choices[0].message.content;
found.logprobs = (await ask([text], { logprobs: true, top_logprobs: 2 })).choices[0].logprobs.content.length;
try {
  await ask([text], { frequency_penalty: 1 });
} catch (error) {
  found.refused = error.message;
}
console.log(JSON.stringify(found));
