// Three OAuth clients that share no code with us: discover, get a token, use it, have it introspected, give it back.
//
//   clients.mjs '{"url", "agent_id", "cert", "key", "ca", "tool", "resource_server_id", "client_secret"}'
//
// cert, key and ca are files. MASTIO_TEST_OAUTH is where npm put the packages, NODE_EXTRA_CA_CERTS what Node trusts.
// Prints one JSON object: what each client saw. Any surprise ends it with an error.

import assert from "node:assert/strict";
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const settings = JSON.parse(process.argv[2]);
const require = createRequire(path.resolve(process.env.MASTIO_TEST_OAUTH, "package.json"));
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
const oauth = await load("oauth4webapi");
const openid = await load("openid-client");
const dpop = await load("dpop");
const jose = await load("jose");
const undici = await load("undici");

const issuer = new URL(settings.url);
const gateway = new URL("/v1/mcp", settings.url);
const key = await jose.importPKCS8(fs.readFileSync(settings.key, "utf8"), "ES256");
const message = JSON.stringify({
  jsonrpc: "2.0",
  id: 1,
  method: "tools/call",
  params: { name: settings.tool, arguments: { said: "hello" } },
});
const json = { "content-type": "application/json" };
const nonces = { seen: 0 };

function called(answer) {
  assert.equal(answer.result?.isError, false, JSON.stringify(answer));
  return answer.result.content[0].text;
}

// What a client does that is told to come again with a nonce (RFC 9449 §8 and §9).
async function again(isNonceError, request) {
  try {
    return await request();
  } catch (error) {
    if (!isNonceError(error)) throw error;
    nonces.seen += 1;
    return await request();
  }
}

async function byOauth4webapi() {
  const client = { client_id: settings.agent_id };
  const authentication = oauth.PrivateKeyJwt(key);
  const server = await oauth.processDiscoveryResponse(
    issuer,
    await oauth.discoveryRequest(issuer, { algorithm: "oauth2" }),
  );
  const resource = await oauth.processResourceDiscoveryResponse(gateway, await oauth.resourceDiscoveryRequest(gateway));
  assert.deepEqual(resource.authorization_servers, [server.issuer]);
  const DPoP = oauth.DPoP(client, await oauth.generateKeyPair("ES256"));
  const token = await again(oauth.isDPoPNonceError, async () => {
    const parameters = new URLSearchParams({ resource: resource.resource });
    const answer = await oauth.clientCredentialsGrantRequest(server, client, authentication, parameters, { DPoP });
    return await oauth.processClientCredentialsResponse(server, client, answer);
  });
  assert.equal(token.token_type, "dpop");
  const use = () =>
    again(oauth.isDPoPNonceError, () =>
      oauth.protectedResourceRequest(token.access_token, "POST", gateway, new Headers(json), message, { DPoP }),
    );
  const said = called(await (await use()).json());
  const asker = { client_id: settings.resource_server_id };
  const ask = async () => {
    const credential = oauth.ClientSecretBasic(settings.client_secret);
    const answer = await oauth.introspectionRequest(server, asker, credential, token.access_token);
    return await oauth.processIntrospectionResponse(server, asker, answer);
  };
  const before = await ask();
  const revoked = await oauth.revocationRequest(server, client, authentication, token.access_token);
  await oauth.processRevocationResponse(revoked);
  const after = await ask();
  const refusal = await use().then(
    () => null,
    (error) => error,
  );
  assert.ok(refusal instanceof oauth.WWWAuthenticateChallengeError, String(refusal));
  const challenge = refusal.cause.find((one) => one.scheme === "dpop");
  return {
    said,
    active: [before.active, after.active],
    subject: before.sub,
    bound: Object.keys(before.cnf),
    challenge: challenge.parameters,
  };
}

async function byOpenidClient() {
  const config = await openid.discovery(issuer, settings.agent_id, undefined, openid.PrivateKeyJwt(key), {
    algorithm: "oauth2",
  });
  const DPoP = openid.getDPoPHandle(config, await openid.randomDPoPKeyPair("ES256"));
  const token = await openid.clientCredentialsGrant(config, { resource: gateway.href }, { DPoP });
  const use = () =>
    openid.fetchProtectedResource(config, token.access_token, gateway, "POST", message, new Headers(json), { DPoP });
  const said = called(await (await use()).json());
  const asker = await openid.discovery(
    issuer,
    settings.resource_server_id,
    undefined,
    openid.ClientSecretBasic(settings.client_secret),
    { algorithm: "oauth2" },
  );
  const before = await openid.tokenIntrospection(asker, token.access_token);
  await openid.tokenRevocation(config, token.access_token);
  const after = await openid.tokenIntrospection(asker, token.access_token);
  await assert.rejects(use());
  return { said, active: [before.active, after.active] };
}

// A certificate instead of a proof: RFC 8705, both its halves.
async function byCertificate() {
  const dispatcher = new undici.Agent({
    connect: {
      ca: fs.readFileSync(settings.ca),
      cert: fs.readFileSync(settings.cert),
      key: fs.readFileSync(settings.key),
    },
  });
  const withCertificate = (url, options) => undici.fetch(url, { ...options, dispatcher });
  const config = await openid.discovery(issuer, settings.agent_id, undefined, openid.TlsClientAuth(), {
    algorithm: "oauth2",
    [openid.customFetch]: withCertificate,
  });
  const token = await openid.clientCredentialsGrant(config, {});
  assert.equal(token.token_type, "bearer");
  const use = (fetched) => {
    const options = { method: "POST", body: message, headers: { ...json, authorization: `Bearer ${token.access_token}` } };
    return fetched(gateway.href, options);
  };
  const said = called(await (await use(withCertificate)).json());
  // The same token on a connection without the certificate.
  const stolen = await use(fetch);
  await openid.tokenRevocation(config, token.access_token);
  const after = await use(withCertificate);
  dispatcher.close();
  return { said, stolen: stolen.status, after: after.status };
}

// Proofs by the `dpop` package, everything else by hand.
async function byDpop() {
  const metadata = await (await fetch(new URL("/.well-known/oauth-authorization-server", issuer))).json();
  const pair = await dpop.generateKeyPair("ES256");
  let nonce;
  const send = async (url, init, token) => {
    for (;;) {
      const proof = await dpop.generateProof(pair, url, "POST", nonce, token);
      const body = typeof init.body === "function" ? await init.body() : init.body;
      const answer = await fetch(url, { method: "POST", ...init, body, headers: { ...init.headers, dpop: proof } });
      const given = answer.headers.get("dpop-nonce");
      const text = await answer.text();
      if (answer.ok || given === null || given === nonce || !text.includes("use_dpop_nonce")) {
        return { status: answer.status, body: text };
      }
      nonces.seen += 1;
      nonce = given;
    }
  };
  const granted = await send(metadata.token_endpoint, {
    body: async () =>
      new URLSearchParams({
        grant_type: "client_credentials",
        client_assertion_type: "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
        client_assertion: await new jose.SignJWT({})
          .setProtectedHeader({ alg: "ES256" })
          .setIssuer(settings.agent_id)
          .setSubject(settings.agent_id)
          .setAudience(metadata.token_endpoint)
          .setIssuedAt()
          .setExpirationTime("1m")
          .setJti(crypto.randomUUID())
          .sign(key),
      }),
  });
  assert.equal(granted.status, 200, granted.body);
  const token = JSON.parse(granted.body).access_token;
  const keys = jose.createRemoteJWKSet(new URL(metadata.jwks_uri));
  const { payload } = await jose.jwtVerify(token, keys, { audience: "cullis-local", algorithms: ["ES256"] });
  const used = await send(gateway.href, { body: message, headers: { ...json, authorization: `DPoP ${token}` } }, token);
  assert.equal(used.status, 200, used.body);
  return { said: called(JSON.parse(used.body)), subject: payload.sub };
}

const told = {
  oauth4webapi: await byOauth4webapi(),
  "openid-client": await byOpenidClient(),
  certificate: await byCertificate(),
  dpop: await byDpop(),
};
console.log(JSON.stringify({ ...told, nonces_seen: nonces.seen }));
