// Lends an agent's credentials to MCP clients that have none: plain HTTP in, HTTPS with token and DPoP proof out.
//
//   front.mjs '{"url", "agent_id", "key", "ca"}'
//
// key and ca are files. Listens on a free port of 127.0.0.1, prints {"url":…} as its first line and serves until stdin
// closes. Everything but the credentials, the name of the host and a browser's origin that is ours passes as it came,
// and as soon as it comes. A client that hangs up is hung up on there too.

import crypto from "node:crypto";
import fs from "node:fs";
import http from "node:http";
import https from "node:https";

const settings = JSON.parse(process.argv[2]);
const mastio = new URL(settings.url);
const endpoint = new URL("/v1/mcp", mastio).href;
const agent = new https.Agent({ ca: fs.readFileSync(settings.ca), keepAlive: true, maxSockets: 512 });
const own = crypto.createPrivateKey(fs.readFileSync(settings.key));
const { privateKey, publicKey } = crypto.generateKeyPairSync("ec", { namedCurve: "P-256" });
const { kty, crv, x, y } = publicKey.export({ format: "jwk" });

const now = () => Math.floor(Date.now() / 1000);
const encoded = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");

function signed(key, header, claims) {
  const input = `${encoded(header)}.${encoded(claims)}`;
  const signature = crypto.sign("sha256", Buffer.from(input), { key, dsaEncoding: "ieee-p1363" });
  return `${input}.${signature.toString("base64url")}`;
}

function proof(htm, htu, more = {}) {
  const claims = { jti: crypto.randomUUID(), htm, htu, iat: now(), ...more };
  return signed(privateKey, { typ: "dpop+jwt", alg: "ES256", jwk: { kty, crv, x, y } }, claims);
}

function ask(url, options, body) {
  return new Promise((resolve, reject) => {
    const request = https.request(url, { ...options, agent }, (response) => {
      const chunks = [];
      response.on("data", (chunk) => chunks.push(chunk));
      response.on("end", () => resolve([response.statusCode, Buffer.concat(chunks).toString()]));
    });
    request.on("error", reject);
    request.end(body);
  });
}

async function logIn() {
  const token = new URL("/v1/auth/token", mastio).href;
  const claims = {
    iss: settings.agent_id,
    sub: settings.agent_id,
    aud: mastio.origin,
    jti: crypto.randomUUID(),
    iat: now(),
    exp: now() + 60,
  };
  const form = new URLSearchParams({
    grant_type: "client_credentials",
    client_id: settings.agent_id,
    client_assertion_type: "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
    client_assertion: signed(own, { alg: "ES256", typ: "JWT" }, claims),
    resource: endpoint,
  });
  const headers = { "content-type": "application/x-www-form-urlencoded", dpop: proof("POST", token) };
  const [status, text] = await ask(token, { method: "POST", headers }, form.toString());
  if (status !== 200) throw new Error(`no token: ${status} ${text}`);
  return JSON.parse(text).access_token;
}

const token = await logIn();
const ath = crypto.createHash("sha256").update(token).digest("base64url");

const server = http.createServer((request, response) => {
  const headers = { ...request.headers, authorization: `DPoP ${token}`, dpop: proof(request.method, endpoint, { ath }) };
  const host = `127.0.0.1:${server.address().port}`;
  const ours = [host, `localhost:${server.address().port}`];
  // A name that is not ours stays: whoever comes by it is to be refused, and not by us.
  if (ours.includes(headers.host)) headers.host = mastio.host;
  if (ours.some((name) => headers.origin === `http://${name}`)) headers.origin = mastio.origin;
  const there = https.request(endpoint, { method: request.method, headers, agent, servername: mastio.hostname }, (answer) => {
    response.writeHead(answer.statusCode, answer.headers);
    response.flushHeaders();
    answer.pipe(response);
    answer.on("error", () => response.destroy());
  });
  there.on("error", () => response.destroy());
  response.on("close", () => there.destroy());
  request.pipe(there);
});
server.keepAliveTimeout = 60_000;
server.listen(0, "127.0.0.1", () => console.log(JSON.stringify({ url: `http://127.0.0.1:${server.address().port}/mcp` })));
process.stdin.on("end", () => process.exit(0)).resume();
