// A small OpenID Connect provider in front of single sign-on: `oidc-provider`, with a page that asks who one is.
//
//   node judges/oauth/provider.mjs SETTINGS
//
// SETTINGS is JSON: redirect_uri, client_id, client_secret, accounts (a name for each, with its groups). It listens on a
// free port of this machine, prints {"issuer": …} and serves until its input closes. MASTIO_TEST_OAUTH is where npm put
// the packages.
import fs from "node:fs";
import http from "node:http";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(path.resolve(process.env.MASTIO_TEST_OAUTH, "package.json"));
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
// Its remarks on development keys are not for the one line that we print.
console.info = console.warn = () => {};
const { default: Provider } = await load("oidc-provider");

const { redirect_uri, client_id, client_secret, accounts } = JSON.parse(process.argv[2]);
const server = http.createServer();
await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
const issuer = `http://localhost:${server.address().port}`;

const provider = new Provider(issuer, {
  clients: [{
    client_id, client_secret, redirect_uris: [redirect_uri], response_types: ["code"],
    grant_types: ["authorization_code"], token_endpoint_auth_method: "client_secret_basic",
  }],
  claims: { openid: ["sub", "groups"], profile: [], email: [] },
  conformIdTokenClaims: false,
  pkce: { required: () => true },
  features: { devInteractions: { enabled: false } },
  cookies: { keys: ["of a test"] },
  ttl: { Session: 600, Interaction: 600, Grant: 600, AccessToken: 600, IdToken: 600, AuthorizationCode: 60 },
  interactions: { url: (_context, interaction) => `/who/${interaction.uid}` },
  findAccount: (_context, id) => ({ accountId: id, claims: () => ({ sub: id, groups: accounts[id] ?? [] }) }),
  // Whoever signs in has agreed.
  loadExistingGrant: async (context) => {
    const grant = new provider.Grant({
      clientId: context.oidc.client.clientId, accountId: context.oidc.session.accountId,
    });
    grant.addOIDCScope("openid profile email");
    await grant.save();
    return grant;
  },
});

const page = (names) => `<!doctype html><html lang="en"><title>Who are you?</title><body><main><h1>Who are you?</h1>
<form method="post">${names.map((name) => `<button name="account" value="${name}">${name}</button>`).join(" ")}
<button name="account" value="">nobody</button></form></main></body></html>`;

server.on("request", async (request, response) => {
  if (!request.url.startsWith("/who/")) return provider.callback()(request, response);
  if (request.method === "GET") {
    response.setHeader("content-type", "text/html; charset=utf-8");
    return response.end(page(Object.keys(accounts)));
  }
  let body = "";
  for await (const chunk of request) body += chunk;
  const account = new URLSearchParams(body).get("account");
  const result = account
    ? { login: { accountId: account } }
    : { error: "access_denied", error_description: "nobody wants to be signed in" };
  return provider.interactionFinished(request, response, result);
});

console.log(JSON.stringify({ issuer }));
fs.createReadStream(null, { fd: 0 }).on("end", () => process.exit(0)).resume();
