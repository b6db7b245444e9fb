/**
 * Runs the README: each fenced block and each command in it has a test here, or else the last test
 * fails. `HOST` is an address in a namespace, `dscp-get` the script of this checkout.
 *
 * @module
 */

import assert from "node:assert/strict";
import { Exit } from "../main.ts";
import { comparisonText, Row } from "../src/series.ts";
import { markOf } from "../ffi/mod.ts";
import { SCENES } from "./lab/lab.ts";
import { DENO_PATH, Folder, ROOT } from "./support/folder.ts";
import { Chain, Namespace, Network, rewrite, SERVER } from "./support/namespaces.ts";
import { Capture } from "./support/packets.ts";
import { Background, dscpGet, execute, optionsOf, succeed, testWith } from "./support/processes.ts";
import { FarEnd } from "./support/servers.ts";

const readme = await Deno.readTextFile(`${ROOT}README.md`);
const NEEDS = ["root", "ip", "nft", "sysctl", "bash"];

// ─── The blocks and commands of the README ───────────────────────────────────────────────────────

const FENCED = /^```(\w*)\n([^]*?)^```$/gm;
const blocks = [...readme.matchAll(FENCED)].map(([, language, text]) => ({ language, text }));

/** The command lines in the shell blocks, in their comments, and in the text. */
const commands = [
  ...blocks.filter(({ language }) => language === "sh").flatMap(({ text }) =>
    text.trimEnd().split("\n").flatMap((line) => {
      const [command, comment = ""] = line.split(/ +# /);
      const other = /(?:or|fish): (.*)$/.exec(comment);
      return other === null ? [command] : [command, other[1]];
    })
  ),
  ...[...readme.replaceAll(FENCED, "").matchAll(/`((?:npx|deno|dscp-get|sudo|source) [^`]+)`/g)]
    .map(([, command]) => command),
];

const covered = new Set<string>();

/** Returns the text that is this one or alone starts so, and notes that a test covers it. */
function cover(start: string, texts: readonly string[]): string {
  const [found, ...others] = texts.includes(start)
    ? [start]
    : texts.filter((text) => text.startsWith(start));
  const wanted = `one block or command of the README starts with '${start}'`;
  assert.ok(found !== undefined && others.length === 0, wanted);
  covered.add(found);
  return found;
}

/** The sample that starts so. */
function sample(start: string): string {
  return cover(start, blocks.map(({ text }) => text));
}

/** The command line that starts so. */
function command(start: string): string {
  return cover(start, commands);
}

/** Returns the words that run a command line of the README in bash, in the checkout. */
function words(
  line: string,
  { under = [], host = "127.0.0.1" }: { under?: readonly string[]; host?: string } = {},
): string[] {
  const script = line.replace(/^sudo /, "").replace("HOST", host)
    .replace(/^dscp-get /, "deno run --no-prompt --allow-net --allow-ffi main.ts ");
  return [...under, "env", "-C", ROOT, `PATH=${DENO_PATH}`, "bash", "-c", `exec ${script}`];
}

/** Lines without numbers, the width of columns, and the length of bars, which differ by run. */
function shape(text: string): string[] {
  return text.trim().split("\n").map((line) =>
    line.replace(/\b\d+(\.\d+)?\b/g, "N").replace(/[█▏▎▍▌▋▊▉]+/g, "█").replace(/ +/g, " ")
  );
}

/** Checks that an abridged sample's lines are lines of the output, in the same order. */
function assertHasLines(output: readonly string[], lines: readonly string[]): void {
  let at = -1;
  for (const line of lines) {
    at = output.indexOf(line, at + 1);
    assert.ok(at >= 0, `no line, or no later one, is '${line}':\n${output.join("\n")}`);
  }
}

// ─── Get it ──────────────────────────────────────────────────────────────────────────────────────

const [OUTCOMES, REPORT] = [sample("sent "), sample("connected ")];
const RUN = command("deno run --allow-net --allow-ffi main.ts");
const TASKS = ["test", "ok", "bench", "coverage"].map((task) => command(`deno task ${task}`));
const BY_NPX = ["run", "task"].map((rest) => command(`npx --yes deno ${rest}`));
const FIRST = sample("npx ");

Deno.test("the README's first commands are the two, in both forms; npx is not run here", () => {
  assert.deepEqual(
    FIRST.trim().split("\n").map((line) => line.split(/ +# or: /)),
    [["run --allow-net --allow-ffi main.ts"], ["task test"]].map((
      [rest],
    ) => [`npx --yes deno ${rest}`, `deno ${rest}`]),
  );
  assert.deepEqual(BY_NPX, [RUN, TASKS[0]].map((line) => `npx --yes ${line}`));
});

Deno.test("the README's tasks exist; they are not run here", async () => {
  const list = ["env", "-C", ROOT, "NO_COLOR=1", Deno.execPath(), "task"];
  const { stdout } = await succeed(...list);
  for (const task of [...TASKS, "deno task lab"]) {
    assert.match(stdout, new RegExp(`^- ${task.split(" ").at(-1)}$`, "m"));
  }
});

const INSTALL = sample("deno install"), INSTALLING = command("deno install");
const COMPLETIONS = { bash: command("source "), fish: command("dscp-get --completions fish") };

for (
  const [shell, load, show] of [
    ["bash", COMPLETIONS.bash, "complete -p dscp-get"],
    ["fish", COMPLETIONS.fish, "complete -C 'dscp-get --mark'"],
  ]
) {
  testWith(["bash", shell], `the README's commands install dscp-get: ${shell}`, async () => {
    await using home = await Folder.create();
    const run = async (...words: string[]) => (await home.run("env", "-C", ROOT, ...words)).stdout;
    assert.ok(INSTALL.includes(load));
    await run("bash", "-c", INSTALLING);
    assert.match(await run("dscp-get", "--version"), /^dscp-get \d/);
    assert.match(await run(shell, "-c", `${load}\n${show}`), /dscp|--mark-syn/);
  });
}

// ─── Outcomes, report and JSON ───────────────────────────────────────────────────────────────────

testWith(NEEDS, "the README's three outcomes, abridged, and their exit codes", async () => {
  await using network = await Network.create();
  const { client, router, server } = network;
  await using _farEnd = await FarEnd.start("[::]:8086", server.under);
  const url = `http://${SERVER.ipv4}:8086/`;
  const proved = await dscpGet([url], client);
  await rewrite(client, "output", "ef", "cs1");
  const changedHere = await dscpGet([url], client);
  await client.run("nft", "flush", "ruleset");
  await rewrite(router, "forward", "ef", "cs0");
  const changedOnPath = await dscpGet(["--mark-syn", url], client);
  const outcomes = OUTCOMES.trim().split("\n").map((line) => line.split(/ +exit /));
  for (const [at, { code, stderr }] of [proved, changedHere, changedOnPath].entries()) {
    const [line, exit] = outcomes[at];
    const parts = shape(line)[0].split("…").map((part) => part.replace(/[^\w ]/g, "\\$&"));
    assert.match(shape(stderr).join("\n"), new RegExp(`^${parts.join(".*")}$`, "m"));
    assert.equal(code, Number(exit));
  }
  assert.equal(outcomes.length, 3);
});

testWith(["root", "ip", "bash"], "the README's sample report is what a run prints", async () => {
  await using namespace = await Namespace.create();
  const { code, stderr } = await execute(words(RUN, namespace));
  assert.equal(code, 0);
  assert.deepEqual(shape(REPORT), shape(stderr));
});

const JSON_SAMPLE = sample("{");

testWith(["root", "ip"], "the README's sample JSON has the keys of a run's", async () => {
  await using namespace = await Namespace.create();
  const keys = (value: unknown): unknown =>
    typeof value === "object" && value !== null && !Array.isArray(value)
      ? Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, keys(inner)]))
      : typeof value;
  const { stdout } = await dscpGet(["--json"], namespace);
  const [written, printed] = [JSON_SAMPLE, stdout].map((text) => keys(JSON.parse(text)));
  assert.deepEqual(written, printed);
  assert.equal(JSON.stringify(written), JSON.stringify(printed), "in the same order");
});

Deno.test("the README and --help name every option and exit code of the script", async () => {
  const { stdout: help } = await dscpGet(["--help"]);
  for (const { short, long } of optionsOf(help)) {
    assert.ok(readme.includes(`\`${short ?? long}`), long);
  }
  for (const code of Object.values(Exit).filter((code) => code > 0)) {
    assert.match(help, new RegExp(`\\b${code}\\b`));
    assert.match(readme, new RegExp(`^\\|[^|]*\\b${code}\\b[^|]*\\|`, "m"));
  }
});

// ─── Recipes ─────────────────────────────────────────────────────────────────────────────────────

sample("dscp-get -d AF41"); // each of its commands has a test

const SERVE = command("dscp-get --serve"), BOTH_ENDS = command("dscp-get --mark-syn http");
const ARRIVED = sample("Arrived-");

testWith(NEEDS, "the README's both ends: the reply of --serve, abridged", async () => {
  await using network = await Network.create();
  const { client, server } = network;
  await using _farEnd = await FarEnd.of(words(SERVE, server));
  const here = { under: client.under, host: SERVER.ipv4 };
  const { code, stderr } = await execute(words(BOTH_ENDS, here));
  assert.equal(code, 0);
  assert.match(stderr, /^handshake .*; proved by the mark that the server reports$/m);
  const { stdout } = await execute(words(`${BOTH_ENDS} -i`, here));
  assertHasLines(shape(stdout.replaceAll("\r", "")), shape(ARRIVED));
});

const COMPARE = command("dscp-get --mark-syn -d"), COMPARED = sample("     ");

testWith(NEEDS, "the README's comparison of marks is what a run prints", async () => {
  await using network = await Network.create();
  const { client, server } = network;
  await using _farEnd = await FarEnd.of(words(SERVE, server));
  const { code, stdout } = await execute(
    words(COMPARE, { under: client.under, host: SERVER.ipv4 }),
  );
  assert.equal(code, 0);
  const [written, printed] = [shape(COMPARED), shape(stdout)];
  const sentence = written.pop()!;
  assert.deepEqual(written, printed.slice(0, written.length));
  const counts = (text: string) =>
    text.split("\n").slice(2, 5).map((line) => line.split(/ +/).slice(0, 6));
  assert.deepEqual(counts(COMPARED), counts(stdout), "requests, failed and wrong are exact");
  // A run may see a difference, by chance; so the sentence is that of equal times.
  const rows = [["EF", 0xb8], ["AF41", 0x88], ["DF", 0]].map(([name, tos]) => {
    const row = new Row({ ...markOf(Number(tos)), name: String(name) });
    for (let at = 0; at < 20; at++) row.requests = row.total.push(at);
    return row;
  });
  assert.equal(sentence, shape(comparisonText(rows, Infinity))[0]);
  const start = sentence.slice(0, sentence.indexOf(":"));
  assert.ok(printed[written.length].startsWith(start), stdout);
});

const TRACE = command("dscp-get --trace"), HOPS = sample("hop ");

testWith(NEEDS, "the README's trace is what a run prints, and exits 102", async () => {
  await using chain = await Chain.create(2);
  const { client, routers, server, serverAddress } = chain;
  await using _farEnd = await FarEnd.of(words(SERVE, server));
  await rewrite(routers[0], "forward", "ef", "cs1");
  const { code, stdout, stderr } = await execute(
    words(TRACE, { under: client.under, host: serverAddress.ipv4 }),
  );
  assert.equal(code, Exit.arrivedChanged, stderr);
  // Addresses are those of the sample; only times differ.
  const exact = (text: string) => text.trim().replace(/ +\d+\.\d+(?= )/g, " N").split("\n");
  assert.deepEqual(exact(HOPS), exact(stdout));
});

const LOOK = command("sudo tcpdump");

testWith(
  ["root", "ip", "tcpdump", "bash"],
  "the README's tcpdump shows the mark of IPv4 and IPv6",
  async () => {
    await using namespace = await Namespace.create();
    const [, ...quoted] = /# look yourself: "(.*)", "(.*)"$/m.exec(readme)!;
    const atOnce = `${LOOK} -n -l --immediate-mode`;
    await using tcpdump = new Background(words(atOnce, namespace));
    await tcpdump.until((said) => said.includes("listening on"));
    for (const [at, option] of ["-4", "-6"].entries()) {
      const before = tcpdump.said.length;
      await dscpGet([option], namespace);
      await tcpdump.until((said) => said.slice(before).includes(quoted[at]));
    }
  },
);

// ─── Programs ────────────────────────────────────────────────────────────────────────────────────

const PROGRAM = sample("import "), MY_SERVER = command("dscp-get -d AF41");
const IMPORTED = PROGRAM.replaceAll('"./', `"file://${ROOT}`);

/** Writes a program to a file, and removes it at the end. */
async function withProgram(text: string, use: (file: string) => Promise<void>): Promise<void> {
  const file = await Deno.makeTempFile({ prefix: "dscp-get-", suffix: ".ts" });
  try {
    await Deno.writeTextFile(file, text);
    await use(file);
  } finally {
    await Deno.remove(file);
  }
}

Deno.test("the README's TypeScript is well-typed", async () => {
  await withProgram(IMPORTED, async (file) => {
    await succeed(Deno.execPath(), "check", file);
  });
});

testWith(
  ["root", "ip", "tcpdump", "bash"],
  "the README's program prints what its comment says; its server is the one to ask with AF41",
  async () => {
    await using namespace = await Namespace.create();
    const { under } = namespace;
    await using _farEnd = await FarEnd.start("8086", under);
    const text = IMPORTED.replace("http://192.0.2.1/", "http://127.0.0.1:8086/");
    await withProgram(`${text}console.log("ready");`, async (file) => {
      const run = [Deno.execPath(), "run", "--no-prompt", "--allow-net", "--allow-ffi", file];
      await using program = new Background([...under, "env", "NO_COLOR=1", ...run]);
      const said = await program.until((said) => said.includes("ready"));
      const comment = /\/\/ (true .*)$/m.exec(PROGRAM)![1];
      const parts = comment.replaceAll(" ", "").split("…")
        .map((part) => part.replace(/[^\w]/g, "\\$&"));
      assert.match(said.replace(/\s/g, ""), new RegExp(parts.join(".*")));
      await using capture = await Capture.start(8080, "lo", under);
      const { code, stdout, stderr } = await execute(words(MY_SERVER, namespace));
      assert.deepEqual([code, stdout], [0, "hello"], stderr);
      assert.match(stderr, /^sent .* with 0x88, .*: proved$/m);
      const sent = (await capture.connection()).filter(({ from, flags }) =>
        from === 8080 && !flags.includes("R")
      );
      assert.deepEqual(new Set(sent.map(({ tos }) => tos)), new Set([0xb8]));
      assert.ok(sent.some(({ flags }) => flags === "S."), "the SYN-ACK too");
    });
  },
);

const DOC = command("deno doc");

testWith(["bash"], "the README's deno doc describes the parts", async () => {
  const { stdout } = await succeed(...words(DOC));
  for (const part of ["setTos", "watchSent", "drainSent", "dial"]) {
    assert.ok(stdout.includes(part), part);
  }
});

// ─── The lab ─────────────────────────────────────────────────────────────────────────────────────

const LAB = 'sudo "$(command -v deno)" task lab', LAB_NEEDS = [...NEEDS, "tc", "setpriv"];
sample(LAB); // each of its commands has a test
const [PRIORITY, PATH_SCENE, ALL] = ["", " --scene path", " --scene all"].map((rest) =>
  command(`${LAB}${rest}`)
);
const [, PICTURE] = /!\[.*\]\((.*)\)/.exec(readme)!;
const [, DESCRIPTION] = /<desc>(.*)<\/desc>/.exec(await Deno.readTextFile(`${ROOT}${PICTURE}`))!;
// The last one has probabilities, which may have an exponent.
const SENTENCES = DESCRIPTION.split(" Against ")[0];

testWith(LAB_NEEDS, "the README's first scene says what its picture says", async () => {
  const { code, stdout, stderr } = await execute(words(PRIORITY));
  assert.equal(code, 0, stderr);
  // A sentence may break at other words, and be about seconds.
  const said = (text: string) =>
    shape(text.replace(/(?<!\n)\n(?!\n)/g, " ").replace(/(?<=[.:]) (?=[A-Z])/g, "\n"))
      .map((line) => line.replace(/\bN s\b/g, "N ms"));
  assertHasLines(said(stdout), said(SENTENCES));
});

testWith(LAB_NEEDS, "the README's second scene draws its picture", async () => {
  const folder = await Deno.makeTempDir({ prefix: "dscp-get-" });
  try {
    const [, file] = / --svg (\S+)$/.exec(PATH_SCENE)!;
    const { code, stderr } = await execute(
      words(PATH_SCENE.replace(file, `${folder}/${file}`)),
    );
    assert.equal(code, 0, stderr);
    assert.match(await Deno.readTextFile(`${folder}/${file}`), /<svg [^]*<\/svg>\n$/);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

testWith(
  LAB_NEEDS,
  "the README's command for all scenes is accepted; it is not run here",
  async () => {
    // What cannot be written is refused behind the arguments and before the first scene.
    const { code, stderr } = await execute(words(ALL.replace("lab.html", "/nowhere/lab.html")));
    assert.equal(code, Exit.cannotWrite, stderr);
    assert.match(stderr, /^lab: cannot write \/nowhere\/lab\.html/m);
  },
);

Deno.test("the README names all scenes of the lab", () => {
  const [, lab] = readme.split("## The lab\n");
  for (const { name } of SCENES) assert.ok(lab.split("```")[0].includes(`\`${name}\``), name);
});

// ─── Everything ──────────────────────────────────────────────────────────────────────────────────

sample("- uses: denoland/setup-deno"); // action_test.ts runs it

Deno.test("every block and every command of the README has a test", () => {
  const texts = [...blocks.map(({ text }) => text), ...commands];
  assert.deepEqual(texts.filter((text) => !covered.has(text)), []);
  assert.equal(readme.match(/^ *(```|~~~)/gm)!.length, 2 * blocks.length, "other fences");
});

Deno.test("a sample that is abridged says so", () => {
  for (const abridged of [OUTCOMES, ARRIVED]) {
    const before = readme.slice(0, readme.indexOf(`\`\`\`\n${abridged}`));
    assert.match(before, /abridged\)?:\n\n$/);
  }
});
