// An MCP client on the official TypeScript SDK: does what it is told, and prints what it saw as one JSON object.
//
//   client.mjs '{"url", "calls": [[TOOL, ARGUMENTS], …], "resources": [URI, …], "prompts": [[NAME, ARGUMENTS], …],
//                "judge": true, "long": [TOOL, ARGUMENTS]}'
//
// MASTIO_TEST_MCP is where npm put the packages. `judge`: the server is upstream.py, and what only it has is tried too.
// `long`: a call of which the progress counts.

import path from "node:path";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const told = JSON.parse(process.argv[2]);
const require = createRequire(path.resolve(process.env.MASTIO_TEST_MCP, "package.json"));
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
const { Client } = await load("@modelcontextprotocol/sdk/client/index.js");
const { StreamableHTTPClientTransport } = await load("@modelcontextprotocol/sdk/client/streamableHttp.js");
const types = await load("@modelcontextprotocol/sdk/types.js");

const seen = {};
const logged = [];
const updated = new Set();
const client = new Client({ name: "judge", version: "1" }, { capabilities: { elicitation: {}, roots: {}, sampling: {} } });
client.setNotificationHandler(types.LoggingMessageNotificationSchema, ({ params }) => {
  logged.push([params.level, params.data]);
});
client.setNotificationHandler(types.ResourceUpdatedNotificationSchema, ({ params }) => {
  updated.add(params.uri);
});
client.setRequestHandler(types.ElicitRequestSchema, () => ({
  action: "accept",
  content: { username: "ada", email: "ada@example.com" },
}));
client.setRequestHandler(types.ListRootsRequestSchema, () => ({ roots: [] }));

async function outcome(promise) {
  try {
    const { _meta, ...value } = await promise;
    return value;
  } catch (error) {
    return { code: error.code, message: error.message };
  }
}

async function until(done, act) {
  const deadline = Date.now() + 20_000;
  while (!(await done())) {
    if (Date.now() > deadline) throw new Error("waited in vain");
    await act?.();
    await new Promise((resolve) => setTimeout(resolve, 30));
  }
}

const text = (result) => result.content[0].text;
const call = (name, input = {}, options) => client.callTool({ name, arguments: input }, undefined, options);

async function judge() {
  seen.counts = [];
  for (let index = 0; index < 3; index += 1) seen.counts.push(text(await call("count")));
  seen.steps = [];
  const onprogress = ({ progress, total, message }) => seen.steps.push([progress, total, message]);
  seen.slow = await call("slow", { steps: 3 }, { onprogress });
  const takenBack = async () => Number(text(await call("taken_back")));
  const before = await takenBack();
  const stop = new AbortController();
  const begun = new Promise((resolve) => {
    call("slow", { steps: 1200 }, { signal: stop.signal, onprogress: resolve }).catch(resolve);
  });
  await begun;
  stop.abort();
  await until(async () => (await takenBack()) > before);
  seen.takenBack = true;
  await client.setLoggingLevel("info");
  await call("test_tool_with_logging");
  await until(() => logged.length >= 3);
  seen.logged = logged;
  seen.asked = await call("test_elicitation", { message: "Who?" });
  const ref = { type: "ref/prompt", name: "test_prompt_with_arguments" };
  seen.completed = await client.complete({ ref, argument: { name: "arg1", value: "pa" } });
  const uri = "test://watched-resource";
  await client.subscribeResource({ uri });
  await call("touch", { uri: "test://static-text" });
  await until(
    () => updated.size > 0,
    () => call("touch", { uri }),
  );
  await client.unsubscribeResource({ uri });
  seen.updated = [...updated];
}

await client.connect(new StreamableHTTPClientTransport(new URL(told.url)));
const byName = (one, other) => (one.name < other.name ? -1 : 1);
seen.tools = (await client.listTools()).tools.sort(byName);
seen.calls = [];
for (const [name, input] of told.calls ?? []) seen.calls.push(await outcome(call(name, input)));
if (told.resources) {
  seen.resources = await outcome(client.listResources());
  seen.templates = await outcome(client.listResourceTemplates());
  seen.read = [];
  for (const uri of told.resources) seen.read.push(await outcome(client.readResource({ uri })));
}
if (told.prompts) {
  seen.prompts = await outcome(client.listPrompts());
  seen.got = [];
  for (const [name, input] of told.prompts) {
    seen.got.push(await outcome(client.getPrompt({ name, arguments: input })));
  }
}
if (told.long) {
  seen.progress = [];
  const onprogress = ({ progress, total }) => seen.progress.push([progress, total]);
  seen.long = await call(...told.long, { onprogress });
}
if (told.judge) await judge();
await client.transport.terminateSession?.();
await client.close();
console.log(JSON.stringify(seen));
