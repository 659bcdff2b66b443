// The dashboard in a real Chromium: the story of the page “Apply updates”, told by mouse, by keyboard or without
// JavaScript. The answer is one JSON line; whatever is wrong ends it with an error.
//
//   node judges/browser/dashboard.mjs SETTINGS
//
// SETTINGS is JSON: url, secret, migration, story (mouse, keyboard, noscript), hold (a file that keeps an apply in its
// middle until it is removed), screenshots (a folder, or nothing). MASTIO_TEST_BROWSER is where npm put the packages,
// MASTIO_TEST_CHROMIUM the browser.
import assert from "node:assert/strict";
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const require = createRequire(path.resolve(process.env.MASTIO_TEST_BROWSER, "package.json"));
const { chromium } = require("playwright-core");
const axe = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const settings = JSON.parse(process.argv[2]);
const { url, secret, migration } = settings;
const update = `/proxy/updates/${migration}`;
const pages = ["/proxy", "/proxy/updates", update, "/proxy/agents", "/proxy/enrollments", "/proxy/tools", "/proxy/pki", "/proxy/mastio-key", "/proxy/audit", "/proxy/settings"];

const browser = await chromium.launch({
  executablePath: process.env.MASTIO_TEST_CHROMIUM,
  args: [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
  ],
});

// What no page may do, whatever a story is about.
const wrongs = [];
let judged = 0;

async function open(options = {}) {
  const context = await browser.newContext({
    ignoreHTTPSErrors: true, baseURL: url, viewport: { width: 1180, height: 800 }, timezoneId: "Europe/Rome",
    locale: "en-GB", ...options,
  });
  context.setDefaultTimeout(60_000);
  const page = await context.newPage();
  page.on("console", (message) => {
    // The browser's own remark on an answer that is no page: the stories ask for some.
    const expected = /Failed to load resource/.test(message.text());
    if (["error", "warning"].includes(message.type()) && !expected) wrongs.push(`console: ${message.text()}`);
  });
  page.on("pageerror", (error) => wrongs.push(`script: ${error}`));
  page.on("request", (request) => {
    if (new URL(request.url()).origin !== url) wrongs.push(`request to ${request.url()}`);
  });
  return page;
}

async function accessible(page, name) {
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme, reducedMotion: "reduce" });
    await page.evaluate(axe);
    const result = await page.evaluate(() =>
      globalThis.axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"] }));
    for (const violation of result.violations) {
      const [{ target, failureSummary }] = violation.nodes;
      wrongs.push(`${name} (${colorScheme}): ${violation.id}: ${violation.help}: ${target} ${failureSummary}`);
    }
    judged += 1;
  }
  await page.emulateMedia({ colorScheme: "light", reducedMotion: null });
}

async function narrow(page, name) {
  await page.setViewportSize({ width: 360, height: 740 });
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  if (wide > 360) wrongs.push(`${name}: ${wide} px wide on a screen of 360`);
  await page.setViewportSize({ width: 1180, height: 800 });
}

async function shot(page, name, options = {}) {
  if (!settings.screenshots) return;
  const file = path.join(settings.screenshots, `${name}.png`);
  if (options.width) await page.setViewportSize({ width: options.width, height: 740 });
  if (options.dark) await page.emulateMedia({ colorScheme: "dark" });
  await page.screenshot({ path: file, fullPage: true, animations: "disabled" });
  await page.emulateMedia({ colorScheme: "light" });
  await page.setViewportSize({ width: 1180, height: 800 });
}

async function judge(page, name) {
  await accessible(page, name);
  await narrow(page, name);
}

async function signIn(page, where) {
  await page.goto(where);
  await page.getByLabel("Admin secret").fill(secret);
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.waitForURL(`**${where}`);
}

const checks = (page, word) => page.locator(`.checks li.${word}`).count();
const halted = (page) => page.getByText("Signing is halted.").count();

async function byMouse() {
  const page = await open();
  await page.goto("/proxy/updates");
  await page.waitForURL("**/proxy/login**");
  await judge(page, "login");
  await page.getByLabel("Admin secret").fill("wrong");
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.getByRole("alert").getByText("this is not the admin secret").waitFor();
  await signIn(page, "/proxy/updates");

  assert.equal(await halted(page), 1);
  for (const where of pages) {
    await page.goto(where);
    assert.equal(await halted(page), 1, `the banner on ${where}`);
    await judge(page, `${where} under the halt`);
  }
  await page.goto("/proxy");
  await page.getByRole("link", { name: "Updates", exact: true }).click();
  await page.getByText("Rotate the Org CA to BasicConstraints(pathLen=1) preserving every agent's public key").waitFor();
  assert.equal(await page.locator(".badge.critical").first().textContent(), "critical");
  await shot(page, "updates-pending");
  await shot(page, "updates-pending-narrow", { width: 360 });

  await page.getByRole("link", { name: "View rollback plan" }).first().click();
  await page.getByText("There is nothing to roll back to yet").waitFor();
  await judge(page, "a rollback plan without a snapshot");
  await page.goto("/proxy/updates");
  await page.getByRole("link", { name: "Apply", exact: true }).first().click();
  await page.getByRole("heading", { name: "What an apply changes" }).waitFor();
  await judge(page, "the plan");
  await shot(page, "apply-plan");

  // Unconfirmed, the browser itself does not send it.
  await page.getByRole("button", { name: "Apply" }).click();
  assert.ok(page.url().endsWith("/apply-review"));
  await page.getByRole("checkbox").check();
  await page.getByRole("button", { name: "Apply" }).click();
  await page.waitForURL(`**${update}`);
  await page.locator("#run").getByText(/prepare: \d+ of \d+/).waitFor();
  await judge(page, "a run");
  await shot(page, "applying");
  await page.reload();
  await page.locator("#run").getByText(/prepare: \d+ of \d+/).waitFor();

  // The session ends in the middle: the page says so by itself, and a sign-in leads back to the run.
  const tab = await page.context().newPage();
  await tab.goto("/proxy");
  await tab.getByRole("button", { name: "Sign out" }).click();
  await tab.waitForURL("**/proxy/login");
  await tab.close();
  await page.waitForURL("**/proxy/login?next=**");
  await page.getByLabel("Admin secret").fill(secret);
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.waitForURL(`**${update}`);
  await page.locator("#run").getByText(/prepare: \d+ of \d+/).waitFor();

  const second = await open();
  await signIn(second, update);
  await second.locator("#run").getByText(/prepare: \d+ of \d+/).waitFor();
  await second.goto("/proxy/updates");
  await second.getByText("is under way").waitFor();
  await second.goto(update);

  fs.rmSync(settings.hold);
  for (const browser of [page, second]) {
    await browser.getByRole("heading", { name: "Verify after apply" }).waitFor();
    assert.equal(await halted(browser), 0);
    assert.equal(await checks(browser, "bad"), 0);
    assert.equal(await checks(browser, "good"), 3);
    assert.equal(await checks(browser, "waiting"), 1);
  }
  await second.context().close();
  return page;
}

// After agents have minted and called, and back again.
async function byMouseAfterwards() {
  const page = await open();
  await signIn(page, update);
  assert.equal(await checks(page, "good"), 4);
  await judge(page, "an applied update");
  await shot(page, "update-applied-dark", { dark: true });
  for (const where of [...pages, "/proxy/agents/acme::agent-0001"]) {
    await page.goto(where);
    assert.equal(await halted(page), 0, where);
    await judge(page, where);
  }
  await page.getByRole("heading", { name: "Latest events" }).waitFor();
  await page.getByRole("cell", { name: "auth.token_issued" }).first().waitFor();
  await page.getByRole("link", { name: "Every event about it" }).click();
  await page.waitForURL("**/proxy/audit?subject=acme**");
  await page.locator("tbody a").first().click();
  await page.getByText("its neighbours follow from one another").waitFor();
  await judge(page, "an event");
  await shot(page, "event");
  await page.goto("/proxy");
  await page.getByRole("img", { name: "Tokens in each of the last 60 minutes" }).waitFor();
  assert.ok((await page.locator(".chart rect").count()) > 0, "no bar in a chart after a token");

  // Somebody else signs in: the page that follows the log shows it by itself.
  await page.goto("/proxy/audit");
  const logins = page.getByRole("cell", { name: "dashboard.login", exact: true });
  const before = await logins.count();
  const somebody = await open();
  await signIn(somebody, "/proxy");
  await somebody.context().close();
  await logins.nth(before).waitFor();
  await judge(page, "a followed log");
  await page.getByRole("button", { name: "Verify the whole chain now" }).click();
  await page.getByText("Sound:").waitFor();
  await page.getByLabel("Event").selectOption("admin.update_applied");
  await page.getByRole("button", { name: "Show" }).click();
  await page.waitForURL("**event_type=admin.update_applied**");
  assert.equal(await page.locator("tbody tr").count(), 1);

  // Times are the viewer's, with UTC beside; digests copy on click.
  await page.goto("/proxy/mastio-key");
  const time = page.locator("td time").first();
  assert.match(await time.getAttribute("title"), /UTC$/);
  await page.context().grantPermissions(["clipboard-read", "clipboard-write"], { origin: url });
  const kid = page.locator("td code").first();
  await kid.click();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), (await kid.textContent()).trim());

  await page.goto(update);
  await page.getByRole("link", { name: "View rollback plan" }).click();
  await page.getByRole("heading", { name: "What a rollback restores" }).waitFor();
  await judge(page, "a rollback plan");
  await page.getByRole("checkbox").check();
  await page.getByRole("button", { name: "Roll back" }).click();
  await page.locator(".badge", { hasText: "rolled back" }).first().waitFor();
  await page.getByRole("button", { name: "Sign out" }).click();
  await page.waitForURL("**/proxy/login");
  await page.goto("/proxy/updates");
  await page.waitForURL("**/proxy/login**");
}

// Nothing but Tab, Space, Enter and typing.
async function byKeyboard() {
  const page = await open();
  const tabTo = async (wanted) => {
    for (let n = 0; n < 80; n += 1) {
      await page.keyboard.press("Tab");
      const name = await page.evaluate(() => document.activeElement?.textContent?.trim() || document.activeElement?.name || "");
      if (name === wanted) return;
    }
    assert.fail(`no way to ${wanted} by Tab on ${page.url()}`);
  };
  await page.goto("/proxy/updates");
  await page.keyboard.type(secret);
  await page.keyboard.press("Enter");
  await page.waitForURL("**/proxy/updates");
  await tabTo("Apply");
  await page.keyboard.press("Enter");
  await page.waitForURL("**/apply-review");
  await tabTo("confirm");
  await page.keyboard.press("Space");
  await tabTo("Apply");
  fs.rmSync(settings.hold);
  await page.keyboard.press("Enter");
  await page.getByRole("heading", { name: "Verify after apply" }).waitFor();
  assert.equal(await checks(page, "bad"), 0);
}

async function withoutScripts() {
  const page = await open({ javaScriptEnabled: false });
  await signIn(page, "/proxy/updates");
  await page.getByRole("link", { name: "Apply", exact: true }).first().click();
  await page.getByRole("checkbox").check();
  await page.getByRole("button", { name: "Apply" }).click();
  await page.locator("#run").getByText(/prepare: \d+ of \d+/).waitFor();
  fs.rmSync(settings.hold);
  // The page fetches itself again while something moves.
  await page.getByRole("heading", { name: "Verify after apply" }).waitFor();
  assert.equal(await checks(page, "bad"), 0);
}

// Somebody asks with the SDK while the page is open; an operator decides by hand, and looks after the agent.
async function enrollments() {
  const page = await open();
  await signIn(page, "/proxy/enrollments");
  await page.getByText("Nobody waits.").waitFor();
  await judge(page, "no enrollment");
  // Whoever runs this story lets two clients ask now.
  fs.rmSync(settings.hold);
  await page.getByRole("link", { name: "Ada <img src=x onerror=alert(1)>" }).waitFor();
  await page.getByRole("link", { name: "Mallory" }).waitFor();
  await judge(page, "enrollments that wait");
  await shot(page, "enrollments");
  await page.getByRole("link", { name: /^Ada/ }).click();
  await page.getByRole("heading", { name: "What will be issued" }).waitFor();
  await judge(page, "an enrollment");
  await shot(page, "enrollment");
  await page.getByLabel("Agent's name").fill("not a name");
  await page.getByRole("button", { name: "Approve" }).click();
  await page.getByText(/agent_name must be/).waitFor();
  await page.goBack();
  await page.getByLabel("Agent's name").fill("billing");
  await page.getByLabel("Capabilities").fill("invoices.read invoices.write");
  await page.getByRole("button", { name: "Approve" }).click();
  await page.waitForURL("**/proxy/agents/*billing");
  await page.getByText("invoices.read, invoices.write").waitFor();
  await page.goto("/proxy/enrollments");
  await page.getByRole("link", { name: "Mallory" }).click();
  await page.getByLabel("What the requester is told").fill("nobody knows you");
  await page.getByRole("button", { name: "Reject" }).click();
  await page.waitForURL("**/proxy/enrollments");
  for (const status of ["approved", "rejected", "expired"]) {
    await page.getByRole("link", { name: status, exact: true }).click();
    await page.waitForURL(`**status=${status}`);
    assert.equal(await page.locator("tbody tr").count(), status === "expired" ? 0 : 1, status);
    await judge(page, `enrollments that are ${status}`);
  }
  await page.getByRole("link", { name: "rejected", exact: true }).click();
  await page.getByRole("link", { name: "Mallory" }).click();
  await page.getByText("It was told: nobody knows you").waitFor();
  assert.equal(await page.getByRole("button", { name: "Approve" }).count(), 0);
  await judge(page, "a rejected enrollment");

  await page.goto("/proxy/agents");
  await page.getByRole("link", { name: /::billing$/ }).click();
  const serial = () => page.locator(".card dd code").first().textContent();
  const before = await serial();
  const deed = async (summary, button) => {
    await page.getByText(summary, { exact: true }).click();
    await page.getByRole("button", { name: button, exact: true }).click();
    await page.waitForURL("**/proxy/agents/*billing");
  };
  await deed("Issue its certificate again", "Issue again");
  assert.notEqual(await serial(), before);
  await deed("Deactivate it", "Deactivate");
  await page.locator("h1 .badge", { hasText: "inactive" }).waitFor();
  for (const summary of await page.locator(".deed summary").all()) await summary.click();
  await judge(page, "an agent and what can be done with it");
  await page.reload();
  await deed("Reactivate it", "Reactivate");
  await page.locator("h1 .badge.good").waitFor();
  await page.getByText("Delete it", { exact: true }).click();
  await page.getByLabel(/^Type/).fill("somebody else");
  await page.getByRole("button", { name: "Delete", exact: true }).click();
  await page.getByText("nothing was deleted").waitFor();
  await page.goBack();
  await page.reload();
  await page.getByText("Delete it", { exact: true }).click();
  await page.getByLabel(/^Type/).fill((await page.locator("h1").textContent()).trim().split(" ")[0]);
  await page.getByRole("button", { name: "Delete", exact: true }).click();
  await page.waitForURL("**/proxy/agents");
  await page.getByText("No agent yet.").waitFor();
  await judge(page, "no agent");
}

const stories = {
  enrollments, mouse: byMouse, afterwards: byMouseAfterwards, keyboard: byKeyboard, noscript: withoutScripts };
try {
  await stories[settings.story]();
  assert.deepEqual(wrongs, []);
  console.log(JSON.stringify({ story: settings.story, judged }));
} finally {
  await browser.close();
}
