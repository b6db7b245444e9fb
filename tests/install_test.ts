import assert from "node:assert/strict";
import { Folder, ROOT } from "./support/folder.ts";
import { MAIN, succeed, testWith } from "./support/processes.ts";
import { Certificates, OK, replying } from "./support/servers.ts";

Deno.test("deno install makes the command dscp-get, and its help shows that form", async () => {
  await using home = await Folder.create();
  const install = "install -g --allow-net --allow-ffi -n dscp-get".split(" ");
  await home.run(Deno.execPath(), ...install, MAIN);
  const command = `${home.path}/bin/dscp-get`;
  const { version } = JSON.parse(await Deno.readTextFile(`${ROOT}deno.json`));
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
  await using home = await Folder.create();
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
    await using home = await Folder.create();
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
    return new Response(await Deno.readTextFile(ROOT + pathname.slice(1)));
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
  const { stderr } = await succeed(
    ...["env", "-C", ROOT, "NO_COLOR=1", Deno.execPath(), "publish", "--dry-run"],
    "--allow-dirty",
  );
  const files = [...stderr.matchAll(/^ +(file:\S+) \(/gm)].map(([, url]) =>
    url.slice(`file://${ROOT}`.length)
  );
  const modules = ["ffi", "src"].flatMap((folder) =>
    [...Deno.readDirSync(`${ROOT}${folder}`)].map(({ name }) => `${folder}/${name}`)
  );
  const others = ["LICENSE", "README.md", "deno.json", "main.ts"];
  const wanted = [".github/call.svg", ".github/lab.svg", ...others, ...modules].sort();
  assert.deepEqual(files.sort(), wanted);
});
