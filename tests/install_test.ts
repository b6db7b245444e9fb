import assert from "node:assert/strict";
import { execute, MAIN, succeed, testWith } from "./support/processes.ts";
import { Certificates, OK, replying } from "./support/servers.ts";

const ROOT = new URL("..", import.meta.url);

/** A folder for Deno's cache and for commands that it installs; gone when disposed of. */
class Home implements AsyncDisposable {
  private constructor(readonly folder: string) {}

  static async create(): Promise<Home> {
    return new Home(await Deno.makeTempDir({ prefix: "dscp-get-" }));
  }

  /** Runs a program with this home. @returns its standard output @throws its exit code is not 0 */
  async run(...words: string[]): Promise<{ stdout: string; stderr: string }> {
    const { folder } = this;
    // An installed command finds deno by PATH.
    const path = `${Deno.execPath().replace(/\/[^/]+$/, "")}:${Deno.env.get("PATH")}`;
    const own = { HOME: folder, DENO_DIR: `${folder}/cache`, DENO_INSTALL_ROOT: folder };
    const outcome = await execute(words, { PATH: path, NO_COLOR: "1", ...own });
    assert.equal(outcome.code, 0, outcome.stderr);
    return outcome;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.folder, { recursive: true });
  }
}

Deno.test("deno install makes the command dscp-get, and its help shows that form", async () => {
  await using home = await Home.create();
  const install = "install -g --allow-net --allow-ffi -n dscp-get".split(" ");
  await home.run(Deno.execPath(), ...install, MAIN);
  const command = `${home.folder}/bin/dscp-get`;
  const { version } = JSON.parse(await Deno.readTextFile(new URL("deno.json", ROOT)));
  assert.equal((await home.run(command, "--version")).stdout, `dscp-get ${version}\n`);
  assert.match((await home.run(command, "--help")).stdout, /^ {2}dscp-get \[options\]/m);
  await using server = replying(OK);
  for (const path of [[], ["--mark-syn"]]) {
    const { stdout, stderr } = await home.run(command, ...path, server.url);
    assert.equal(stdout, "ok");
    assert.match(stderr, /^sent .*: proved$/m);
  }
});

Deno.test("the help of a checkout shows deno run, whatever the working directory", async () => {
  await using home = await Home.create();
  const { stdout } = await home.run("env", "-C", "/", Deno.execPath(), "run", MAIN, "--help");
  assert.match(stdout, /^ {2}deno run --allow-net --allow-ffi main\.ts \[options\]/m);
});

for (
  const [name, needs, args] of [
    ["plain", [], []],
    ["--mark-syn, which loads more modules", [], ["--mark-syn"]],
    ["https with -k, which loads more modules", ["openssl"], ["-k"]],
  ] as const
) {
  testWith(needs, `the script runs from a URL: ${name}`, async () => {
    await using home = await Home.create();
    await using checkout = serveCheckout();
    const { port } = checkout.addr;
    const script = `http://127.0.0.1:${port}/main.ts`;
    const allowed = ["--allow-net", "--allow-ffi", `--allow-import=127.0.0.1:${port}`];
    const run = (...args: string[]) =>
      home.run(Deno.execPath(), "run", ...allowed, script, ...args);
    await using server = name.startsWith("https") ? await secure() : replying(OK);
    const url = "url" in server ? server.url : `https://127.0.0.1:${server.addr.port}/`;
    const { stdout, stderr } = await run(...args, url);
    assert.equal(stdout, "ok");
    assert.match(stderr, /^sent .*: proved$/m);
    const { stdout: help } = await run("--help");
    assert.ok(help.includes(`\n  deno run --allow-net --allow-ffi ${script} [options]`), help);
  });
}

/** Serves the modules of this checkout, and nothing else. */
function serveCheckout(): Deno.HttpServer<Deno.NetAddr> {
  return Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, async ({ url }) => {
    const { pathname } = new URL(url);
    assert.match(pathname, /^\/((main|(ffi|src)\/\w+)\.ts|deno\.json)$/);
    return new Response(await Deno.readTextFile(new URL(`.${pathname}`, ROOT)));
  });
}

async function secure(): Promise<Deno.HttpServer<Deno.NetAddr>> {
  await using certificates = await Certificates.create();
  const cert = await Deno.readTextFile(certificates.certificate);
  const key = await Deno.readTextFile(certificates.key);
  const how = { hostname: "127.0.0.1", port: 0, cert, key, onListen() {} };
  return Deno.serve(how, () => new Response("ok"));
}

Deno.test("deno publish accepts the package, without tests and CI", async () => {
  const { href, pathname } = ROOT;
  const { stderr } = await succeed(
    ...["env", "-C", pathname, "NO_COLOR=1", Deno.execPath(), "publish", "--dry-run"],
    "--allow-dirty",
  );
  const files = [...stderr.matchAll(/^ +(file:\S+) \(/gm)].map(([, url]) => url.slice(href.length));
  const modules = ["ffi", "src"].flatMap((folder) =>
    [...Deno.readDirSync(new URL(folder, ROOT))].map(({ name }) => `${folder}/${name}`)
  );
  const others = ["LICENSE", "README.md", "deno.json", "main.ts"];
  const wanted = [".github/call.svg", ".github/lab.svg", ...others, ...modules].sort();
  assert.deepEqual(files.sort(), wanted);
});
