// Node clients as their users call them: a picture from each, as a line of JSON with what they give back.
// node ask.mjs CLIENTS_FOLDER BASE_URL
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [folder, baseURL] = process.argv.slice(2);
const require = createRequire(`${folder}/`);
const load = async (name) => import(pathToFileURL(require.resolve(name)));

const { default: OpenAI } = await load("openai");
const client = new OpenAI({ apiKey: "none", baseURL, maxRetries: 0 });
const prompt = "a red apple";
const answer = await client.images.generate({ model: "gpt-image-1", prompt });
const stream = await client.images.generate({ model: "gpt-image-1", prompt, stream: true, partial_images: 1 });
const events = [];
for await (const event of stream) events.push(event);
const refused = await client.images.generate({ prompt, n: 11 }).catch((error) => error);
const { DallEAPIWrapper } = await load("@langchain/openai");
const url = await new DallEAPIWrapper({ apiKey: "none", baseUrl: baseURL }).invoke(prompt);
console.log(JSON.stringify({
  b64_json: answer.data[0].b64_json,
  notes: answer.notes,
  events: events.map((event) => event.type),
  last: events.at(-1).b64_json,
  refused: [refused.constructor.name, refused.status, refused.param],
  url,
}));
