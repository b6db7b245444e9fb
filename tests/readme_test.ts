/**
 * Runs the README: each fenced block and each command in it has a test here, or else the last test
 * fails. `HOST` is an address in a namespace, `dscp-get` the script of this checkout.
 *
 * @module
 */

import assert from "node:assert/strict";
import { Exit } from "../main.ts";
import { SCENES } from "./lab/lab.ts";
import { DENO_PATH, Folder, ROOT } from "./support/folder.ts";
import { blocks, commands, found, inline, only } from "./support/markdown.ts";
import { pattern, readme, shape, table } from "./support/markdown.ts";
import { Chain, Namespace } from "./support/namespaces.ts";
import { Capture } from "./support/packets.ts";
import { Background, dscpGet, execute, optionsOf, succeed, testWith } from "./support/processes.ts";
import { FarEnd, replying, startPython } from "./support/servers.ts";

// What a test takes by its start is covered: the last test reads the calls of these in this file.
const command = (start: string) => only(start, commands),
  sample = (start: string) => only(start, blocks);

/** Returns the words that run a command of the README in bash, in the checkout. */
function words(line: string, under: readonly string[] = [], host = "127.0.0.1"): string[] {
  const script = line.replace(/^(sudo )?(npx --yes )?/, "").replace("HOST", host)
    .replace(/^dscp-get /, "deno run --allow-net --allow-ffi main.ts ");
  return [...under, "env", "-C", ROOT, `PATH=${DENO_PATH}`, "bash", "-c", `exec ${script}`];
}

// ─── Get it ──────────────────────────────────────────────────────────────────────────────────────

Deno.test("the README's tasks exist, and npx runs the same; neither is run here", async () => {
  const { tasks } = JSON.parse(await Deno.readTextFile(`${ROOT}deno.json`));
  const inBoth = [command("deno run"), command("deno task test")];
  const others = [
    command("deno task ok"),
    command("deno task coverage"),
    command("deno task bench"),
  ];
  for (const line of [inBoth[1], ...others]) assert.ok(line.split(" ")[2] in tasks, line);
  const byNpx = [command("npx --yes deno run"), command("npx --yes deno task test")];
  assert.deepEqual(byNpx, inBoth.map((line) => `npx --yes ${line}`));
  sample("npx "), sample("deno install"), sample("sudo npx"); // their commands have tests
});

for (
  const [shell, start, show, shown] of [
    ["bash", "", "source ~/.bashrc; complete -p dscp-get", "-F _dscp_get"],
    ["zsh", "autoload -U compinit; compinit -u -D;", "source ~/.zshrc; print $_comps", "_dscp-get"],
    ["fish", command("dscp-get --completions fish"), "; complete -C 'dscp-get --m'", "--mark-syn"],
  ]
) {
  testWith(["bash", shell], `the README's commands install dscp-get: ${shell}`, async () => {
    await using home = await Folder.create();
    const run = (...line: string[]) => home.run("env", "-C", ROOT, ...line);
    assert.match((await run("bash", "-c", command("deno install"))).stderr, /Warning.*config file/);
    await run("bash", "-c", command("dscp-get --completions bash").replaceAll("bash", shell));
    assert.ok((await run(shell, "-c", start + show)).stdout.includes(shown));
    await run("bash", "-c", command("deno uninstall"));
    assert.deepEqual([...Deno.readDirSync(`${home.path}/bin`)], []);
  });
}

testWith(["root", "ip", "bash", "setpriv"], "the README's first screen is a run's", async () => {
  await using namespace = await Namespace.create();
  // As users see it; root also sees the mark of the reply.
  const under = [...namespace.under, "setpriv", "--bounding-set=-net_raw"];
  const { code, stderr } = await execute(words(command("deno run"), under));
  assert.deepEqual([code, shape(stderr)], [0, shape(sample("connected "))]);
});

// ─── Over two routers ────────────────────────────────────────────────────────────────────────────

/** Runs a command on the client, whose and whose router's rules of nftables are only these. */
type Ask = (line: string, rules?: string) => ReturnType<typeof execute>;

function testAsking(name: string, run: (ask: Ask, chain: Chain, farEnd: FarEnd) => Promise<void>) {
  testWith(["root", "ip", "nft", "sysctl", "bash", "python3", "socat"], name, async () => {
    await using chain = await Chain.create(2);
    const { client, routers: [router], server, serverAddress } = chain;
    await using farEnd = await FarEnd.of(words(command("dscp-get --serve"), server.under));
    await run(
      async (line, rules = "") => {
        for (const host of [client, router]) await host.run("nft", "flush", "ruleset");
        for (const [, host, type, hook, rule] of rules.matchAll(/(\w+) (\w+) (\w+) ([^;]+)/g)) {
          const chain = `add chain ip t ${hook} { type ${type} hook ${hook} priority 0; }`;
          const script = `add table ip t; ${chain}; add rule ip t ${hook} ${rule}`;
          await (host === "client" ? client : router).run("nft", script);
        }
        return await execute(words(line, client.under, serverAddress.ipv4));
      },
      chain,
      farEnd,
    );
  });
}

const PASSING = "router filter forward iifname near ip dscp";
/** What makes the lines in the rows of the README's two tables, in their order. */
const ROWS: [start: string, rules?: string, port?: string][] = [
  ["sent … proved`"],
  ["set 0xB8", "client filter output ip dscp ef ip dscp set cs1"],
  ["sent EF", `${PASSING} ef ip dscp set cs0`],
  ["sent … proved for", "of a buffer that is too small: report_test.ts"],
  ["sent … sent again", `${PASSING} ef limit rate 1/day burst 1 packets drop`],
  ["sent … handed", "client nat output tcp dport 8086 redirect to :8086"],
  [
    "sent … not",
    "client nat output tcp dport 8087 redirect to :8086;" +
    "client nat postrouting tcp dport 8086 masquerade to :5000-5100",
    "8087",
  ],
  ["arrived … through", "router nat postrouting oifname far masquerade"],
  ["arrived … on", "", "8087"],
  ["reply … in"],
  ["reply … came", "router filter forward iifname far ip dscp ef ip dscp set cs0"],
  ["handshake", "", "8080"],
];

testAsking("the README's two tables: lines and exit codes", async (ask, chain, farEnd) => {
  const { client: { under }, server } = chain;
  await using _here = await FarEnd.start("[::]:8086", under);
  await using _plain = await startPython(["8080"], server.under);
  const proxy = "socat -dd tcp-listen:8087 tcp:127.0.0.1:8086".split(" ");
  await using between = new Background([...server.under, ...proxy]);
  await between.until((said) => said.includes("listening on"));
  const rows = [...table("what you see"), ...table("a line can say")];
  assert.equal(rows.length, ROWS.length);
  for (const [at, [start, rules, port = "8086"]] of ROWS.entries()) {
    const [says, , exit] = rows[at];
    assert.ok(says.startsWith(`\`${start}`), says);
    if (rules?.startsWith("of")) continue;
    const { code, stderr } = await ask(command("dscp-get http").replace("8086", port), rules);
    for (const said of found(/`(.*?)`/g, says)) assert.match(stderr, pattern(said));
    assert.equal(code, Number(exit.replace("as without", "0")), stderr);
  }
  const [logged] = found(/such as `(.*)`\./g, readme).flatMap(shape);
  assert.ok(shape(farEnd.process.said).includes(logged), logged);
});

testAsking("the README's trace, comparison and --expect are what a run prints", async (ask) => {
  const trace = await ask(command("sudo dscp-get --trace"), `${PASSING} ef ip dscp set cs1`);
  // Addresses are those of the sample; only times differ.
  const exact = (text: string) => text.trim().replace(/ +\d+\.\d+(?= )/g, " N");
  assert.deepEqual([trace.code, exact(trace.stdout)], [102, exact(sample("hop "))]);
  const compared = await ask(command("dscp-get --mark-syn"));
  // A run may see a difference, by chance.
  const [printed, written] = [compared.stdout, sample("     ")].map((text) => text.split(" time:"));
  assert.deepEqual([compared.code, shape(printed[0])], [0, shape(written[0])]);
  const toEF = command("dscp-get -d DF"),
    toAF41 = toEF.replace("DF --expect EF", "EF --expect AF41");
  assert.ok(inline.some((text) => text.includes(" ") && toAF41.includes(text)));
  for (
    const [line, rules, code] of [
      [toEF, "client filter output ip dscp cs0 ip dscp set ef", 0],
      [toEF, `${PASSING} cs0 ip dscp set ef`, 0],
      [toEF, "", 102],
      [toAF41, `${PASSING} ef ip dscp set af41`, 0],
      [toAF41, "", 102],
    ] as const
  ) assert.equal((await ask(line, rules)).code, code, `${line}: ${rules}`);
});

// ─── Reference ───────────────────────────────────────────────────────────────────────────────────

testAsking("the README names all members of JSON, and no others", async (ask) => {
  await using folder = await Folder.create();
  await using plain = replying(
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: b\r\n\r\n",
  );
  const [, line, file] = /^\*\/5 \* \* \* \* (.* )(\S+)$/.exec(command("*/5"))!;
  for (const more of ["", "--expect EF", "-d EF,DF", "--trace"]) {
    await ask(`${line} ${folder.path}/${file} ${more}`, `${PASSING} ef ip dscp set cs0`);
  }
  const text = await Deno.readTextFile(`${folder.path}/${file}`);
  const printed = text + (await dscpGet(["--json", plain.url])).stdout;
  const [rows] = found(/\n(\| JSON member[^]*?)\n\n/g, readme);
  const members = ["built-in", "null", ...found(/"(\w+)":/g, printed)];
  assert.deepEqual([...new Set(found(/`(.+?)`/g, rows))].sort(), [...new Set(members)].sort());
});

Deno.test("the README and --help name every option and exit code", async () => {
  const { stdout: help } = await dscpGet(["--help"]);
  for (const { short, long } of optionsOf(help)) assert.ok(inline.includes(short ?? long), long);
  const codes = table("exit code").map(([code]) => code);
  assert.deepEqual(codes, Object.values(Exit).map(String));
  for (const code of codes) assert.match(help, new RegExp(`\\b${code}\\b`));
});

// ─── Programs, the lab, and everything ───────────────────────────────────────────────────────────

testWith(["root", "ip", "tcpdump", "bash"], "the README's program does what it says", async () => {
  await using namespace = await Namespace.create();
  await using folder = await Folder.create();
  const { under } = namespace, file = `${folder.path}/program.ts`, deno = Deno.execPath();
  const text = sample("import ").replaceAll('"./', `"file://${ROOT}`);
  await Deno.writeTextFile(file, text.replace("http://192.0.2.1/", "http://127.0.0.1:8086/"));
  await succeed(deno, "check", file);
  const { stdout: doc } = await succeed(...words(command("deno doc")));
  for (const part of ["arrivedFrom", "keepArrivals", "setTos"]) assert.ok(doc.includes(part));
  await using _farEnd = await FarEnd.start("8086", under);
  const run = ["env", "NO_COLOR=1", deno, "run", "--allow-net", "--allow-ffi", file];
  await using program = new Background([...under, ...run]);
  const said = (await program.until((said) => said.includes("Listening"))).replace(/\s+/g, "");
  const [before, after] = /\/\/ (true .*)$/m.exec(text)![1].replaceAll(" ", "").split("…");
  assert.ok(said.startsWith(before) && said.includes(after), said);
  await using capture = await Capture.start(8080, "lo", under);
  const { code, stdout } = await execute(words(command("dscp-get -d AF41"), under));
  const { syn, data } = JSON.parse(stdout);
  assert.deepEqual([code, syn, data], [0, 0, 0x88]);
  const marks = (await capture.connection()).filter(({ from, flags }) =>
    from === 8080 && flags !== "R"
  ).map(({ flags, tos }) => `${flags} ${tos}`);
  assert.ok(marks.includes("S. 184") && marks.every((mark) => mark.endsWith(" 184")), `${marks}`);
});

testWith(["root", "ip", "tc", "nft", "setpriv", "bash"], "the README's lab", async () => {
  await using folder = await Folder.create();
  const lab = (start: string, more = "") => execute(words(start + more));
  const [path, picture] = command("sudo npx --yes deno task lab --scene path").split(/(?<=svg )/);
  await lab(path, `${folder.path}/${picture}`);
  assert.match(await Deno.readTextFile(`${folder.path}/${picture}`), /^<svg [^]*<\/svg>\n$/);
  // What cannot be written is refused behind the arguments and before the first scene.
  const all = command("sudo npx --yes deno task lab --scene all").replace("lab.html", "/no/a");
  assert.equal((await lab(all)).code, Exit.cannotWrite);
  const name = `readme${Deno.pid}`, first = command("sudo npx --yes deno task lab");
  await succeed("ip", "netns", "add", `${name}-client`);
  const kept = await lab(command("sudo npx --yes deno task lab --scene drop"), ` --name ${name}`);
  assert.match(kept.stderr, /-client is there already: --again .* --remove removes it/);
  const { stdout: removed } = await lab(first, ` --remove --name ${name}`);
  assert.equal(removed, `removed ${name}-client\n`);
  // The last sentence has probabilities, which may have an exponent; times may be in seconds.
  const [drawn] = found(/<desc>(.*) Against /g, await Deno.readTextFile(`${ROOT}.github/lab.svg`));
  const [shown, wanted] = [(await lab(first)).stdout, drawn].map((text) =>
    shape(text.replace(/\s+/g, " "))[0].replace(/\bN s\b/g, "N ms")
  );
  assert.ok(shown.includes(wanted), shown);
});

Deno.test("the README names all scenes, and files and pictures that exist", async () => {
  for (const { name } of SCENES) assert.ok(inline.includes(name), name);
  const files = sample("src/options.ts").split("\n").slice(0, -1).flatMap((line) => {
    const names = line.split("  ")[0].split(", "), folder = names[0].replace(/[^/]*$/, "");
    return names.map((name) => name.includes("/") ? name : folder + name);
  });
  for (const path of [...files, ...found(/!\[.*?\]\((.*?)\)/g, readme)]) {
    await Deno.stat(ROOT + path);
  }
});

Deno.test("every block and command of the README has a test", async () => {
  sample("- uses"); // action_test.ts runs it
  const source = await Deno.readTextFile(new URL(import.meta.url));
  for (const [name, texts] of Object.entries({ command: commands, sample: blocks })) {
    const starts = found(new RegExp(`\\b${name}\\("(.*?)"\\)`, "g"), source);
    assert.deepEqual(
      texts.filter((text) => !starts.some((start) => only(start, texts) === text)),
      [],
    );
  }
  assert.equal(readme.match(/^ *(```|~~~)/gm)!.length, 2 * blocks.length, "other fences");
});
