import assert from "node:assert/strict";
import { Exit, Failure } from "../main.ts";
import { failureOf } from "../src/failure.ts";
import { usage } from "../src/help.ts";
import {
  DEFAULTS,
  expectedOf,
  MAX_HOPS,
  optionRows,
  OPTIONS,
  type Options,
  parseArguments,
  requestOptionsOf,
  TRACE_TIMEOUT,
  withDefaults,
} from "../src/options.ts";
import { unknownOption } from "../src/suggest.ts";
import { Namespace } from "./support/namespaces.ts";
import { dscpGet, execute, Nobody, testWith } from "./support/processes.ts";
import { Certificates, FarEnd } from "./support/servers.ts";

async function refused(args: string[], code: number, message: RegExp): Promise<void> {
  const { code: exit, stdout, stderr } = await dscpGet(args);
  assert.equal(exit, code, `${args.join(" ")}: ${stderr}`);
  assert.equal(stdout, "");
  const [line, ...rest] = stderr.trimEnd().split("\n");
  assert.match(line, message);
  assert.ok(line.startsWith("dscp-get: "));
  assert.ok(rest.every((hint) => hint.startsWith("hint: ")), stderr);
}

Deno.test("bad marks are usage errors that list what is allowed", async () => {
  for (const value of ["64", "256", "-1", "1.5", "", "EXPEDITED"]) {
    await refused(
      ["-d", value],
      2,
      /allowed are EF, VA or VOICE-ADMIT, NQB, LE.*CS0 to CS7, AF11.*0 to 63/,
    );
  }
  for (const value of ["256", "-1", "1.5", "", "0x100"]) {
    await refused(["--tos", value], 2, /allowed is a number from 0 to 255/);
  }
  await refused(["--tos=0x12"], 2, /ECN bits.*TCP owns.*allowed is 0x10/);
  await refused(["-d", "EF", "--tos", "184"], 2, /mutually exclusive/);
});

Deno.test("other bad usage is told in one line: 2", async () => {
  await refused(["--nonsense"], 2, /unknown option '--nonsense'/);
  await refused(["-s-"], 2, /unknown option '-s-'/);
  await refused(["-s-json"], 2, /unknown option '-s-json'/);
  await refused(["--__proto__"], 2, /unknown option/);
  await refused(["-d"], 2, /-d needs a value/);
  await refused(["--json=yes"], 2, /--json takes no value/);
  await refused(["-m", "soon"], 2, /-m takes seconds from 0 to 2147483.*'soon'/);
  await refused(["--connect-timeout", "-1"], 2, /takes seconds/);
  await refused(["http://a/", "http://b/"], 2, /one URL at a time/);
});

Deno.test("headers that would break the request are refused: 2", async () => {
  const headers = "no colon|Na me: x|: x||Näme: x|X: a\r\nInjected: b|X: a\nb|X\r: a|@file";
  for (const header of headers.split("|")) {
    await refused(["-H", header], 2, /is not a header/);
  }
});

Deno.test("bad URLs and other schemes: 3", async () => {
  const urls =
    "http://|http:///path|http://[::1|http://a b/|http://h:99999/|http://h:0/||mailto:x|http://h/\n" +
    "|http:|http:/|http:/x|HTTPS:/x|http:?|*|http://*/|http://a&b/|http://a'b/";
  for (const url of urls.split("|")) {
    await refused([url], 3, /bad URL/);
  }
  await refused(["ftp://host/"], 3, /scheme must be http or https, not ftp/);
  const { code, stderr } = await dscpGet(["http://user:secret@127.0.0.1/"]);
  assert.equal(code, 3);
  assert.match(stderr, /hint: .*-H 'Authorization: /);
  assert.ok(!stderr.includes("secret"));
});

Deno.test("an option is named as it was given, and a list may have spaces", async () => {
  for (
    const [option, value] of [["-n", "0"], ["--count", "x"], ["--max-hops", "65"], ["-m", "-1"]]
  ) {
    const { code, stderr } = await dscpGet([option, value]);
    assert.deepEqual([code, stderr.startsWith(`dscp-get: ${option} takes `)], [2, true], stderr);
  }
  const { marks } = parseArguments(["-d", "EF, AF41"]);
  assert.deepEqual(marks.map(({ tos }) => tos), [0xb8, 0x88]);
});

Deno.test("with --json a failure is an object with code and message, also one of usage", async () => {
  for (const [args, code] of [[["--json", "-d", "64"], 2], [["--json", "ftp://x/"], 3]] as const) {
    const outcome = await dscpGet(args);
    assert.equal(outcome.code, code);
    const { error } = JSON.parse(outcome.stdout);
    assert.equal(error.code, code);
    assert.ok(error.message.length > 0);
  }
});

Deno.test("terminal escapes in arguments come out escaped", async () => {
  for (
    const args of [
      ["\x1b[31m://x"],
      ["-d", "\x1b]0;title\x07"],
      ["--\x1b[2J"],
      ["-H", "\u202egnp"],
      ["http://h/", "\x9b1m"],
    ]
  ) {
    const { stderr } = await dscpGet(args);
    assert.doesNotMatch(stderr, /(?!\n)[\p{Cc}\u202e]/u);
  }
});

Deno.test("-h and -V print to standard output and exit 0, whatever else is asked", async () => {
  const help = await dscpGet(["-h", "http://127.0.0.1:1/"]);
  assert.deepEqual([help.code, help.stderr], [0, ""]);
  const options = [
    ..."--dscp --tos --header --ipv4 --ipv6 --connect-timeout --max-time --include".split(" "),
    ..."--fail --silent --json --version --help".split(" "),
  ];
  for (const option of options) {
    assert.ok(help.stdout.includes(option), option);
  }
  const { version } = JSON.parse(await Deno.readTextFile(new URL("../deno.json", import.meta.url)));
  assert.equal((await dscpGet(["-V"])).stdout, `dscp-get ${version}\n`);
  for (
    const beside of ["--trace -n 2", "--serve 1 http://x", "--dscp EF --tos 0", "--interval 1"]
  ) {
    assert.equal((await dscpGet([...beside.split(" "), "--help"])).code, 0, beside);
  }
});

Deno.test("short options can be put together, as curl's can", () => {
  const args = ["-sif4", "-dAF41", "-m.5", "-H", "A: b", "--", "http://h/"];
  const options = parseArguments(args);
  const { silent, include, fail, family, marks, maxTime, headers, url } = options;
  assert.deepEqual([silent, include, fail, family], [true, true, true, 4]);
  assert.deepEqual([marks[0].name, maxTime], ["AF41", 0.5]);
  assert.deepEqual([headers, url], [[["A", "b"]], "http://h/"]);
});

Deno.test("a mistake is answered with what was probably meant", async () => {
  const hintOf = async (...args: string[]) => {
    const { code, stderr } = await dscpGet(args);
    assert.equal(code, 2, stderr);
    return /^hint: (.*)$/m.exec(stderr)![1];
  };
  assert.equal(await hintOf("-d", "184"), "if the whole byte is meant: --tos 0xB8, which is EF");
  assert.equal(await hintOf("--tos", "b8"), "did you mean hexadecimal? --tos 0xb8");
  assert.equal(await hintOf("--dcsp", "EF"), "did you mean --dscp?");
  assert.equal(await hintOf("--nothing-of-the-kind"), "--help lists the options");
  assert.match(await hintOf("--allow-net", "http://h/"), /^options of Deno go before main\.ts/);
});

Deno.test("-d may be given several times, all may stand in a list, and -S is taken as curl's", () => {
  const names = (...args: string[]) => parseArguments(args).marks.map(({ name }) => name);
  assert.deepEqual(names("-d", "EF", "-d", "DF,af41"), ["EF", "DF", "AF41"]);
  assert.equal(names("-d", "all,EF").length, 65);
  assert.deepEqual(names("-sS", "http://h/"), ["EF"]);
});

// ─── The parser, in this process ─────────────────────────────────────────────────────────────────

Deno.test("without arguments: EF once to the default port, at most 30 seconds, and a report", () => {
  assert.deepEqual(parseArguments([]), {
    url: null,
    marks: [{ name: "EF", dscp: 46, tos: 0xb8 }],
    expect: [],
    markSyn: false,
    headers: [],
    family: null,
    connectTimeout: 10,
    maxTime: 30,
    trust: null,
    insecure: false,
    cacert: null,
    include: false,
    fail: false,
    requireProof: false,
    silent: false,
    json: false,
    print: null,
    count: 1,
    interval: 0,
    trace: false,
    maxHops: 30,
    serve: null,
    replyMark: null,
  });
});

Deno.test("the help's numbers are those of the defaults, the limits and the exit codes", () => {
  const help = Object.fromEntries(optionRows().map(({ flags, help }) => [flags.at(-1), help]));
  const { connectTimeout, maxTime, interval, maxHops } = DEFAULTS;
  for (
    const [name, words] of [
      ["--dscp", "number from 0 to 63"],
      ["--tos", "such as 184 or 0xB8"],
      ["--connect-timeout", `(default ${connectTimeout}, with --trace ${TRACE_TIMEOUT}; 0: none)`],
      ["--max-time", `(default ${maxTime}; 0: none)`],
      ["--interval", `(default ${interval})`],
      ["--max-hops", `1 to ${MAX_HOPS} (default ${maxHops})`],
      ["--fail", `exit ${Exit.httpError} on status 400 and above`],
      ["--require-proof", `exit ${Exit.notProved} unless`],
      ["--expect", `anything else is ${Exit.arrivedChanged}`],
    ] as const
  ) assert.ok(help[name].includes(words), `${name}: ${help[name]}`);
  assert.match(help["--json"], /^JSON Lines /);
  assert.match(
    help["--count"],
    /one more request, which is not measured, goes to the target first$/,
  );
  assert.match(help["--serve"], /replies carry the mark of -d .*SYN-ACK included, else .*request$/);
  const text = usage(1000, startedAs("file:///x/main.ts", null));
  const [, codes] = /^(Exit codes: .*)$/m.exec(text)!;
  const listed = [...codes.matchAll(/(?<=[:;,] )(\d+) /g)].map(([, code]) => Number(code));
  assert.deepEqual(listed, Object.values(Exit), "every code once, in rising order");
});

/** What the arguments change of the defaults; marks are shown as their bytes. */
function changed(args: readonly string[]): Record<string, unknown> {
  const options = parseArguments(args);
  const keys = Object.keys(DEFAULTS) as (keyof Options)[];
  const others = keys.filter((key) => options[key] !== DEFAULTS[key]);
  return Object.fromEntries(others.map((key) => [
    key,
    key === "marks"
      ? options.marks.map(({ tos }) => tos)
      : key === "expect"
      ? options.expect.map(({ name }) => name)
      : options[key],
  ]));
}

const MAX = 2_147_483;

for (
  const [args, expected] of [
    [[], {}],
    [["h"], { url: "h" }],
    [[""], { url: "" }],
    [["-"], { url: "-" }],
    [["--", "-d"], { url: "-d" }],
    [["--"], {}],
    [["-d", "--", "h"], /"--" is not a DSCP/],
    [["a", "--", "b"], /one URL at a time, not 2: 'a' 'b'/],
    [["a", "b", "c\x07"], /one URL at a time, not 3: 'a' 'b' 'c\\x07'/],
    // Names and values
    [["--dscp=AF41"], { marks: [0x88] }],
    [["--dscp", "AF41", "h"], { marks: [0x88], url: "h" }],
    [["-dAF41"], { marks: [0x88] }],
    [["-d", "-1"], /"-1" is not a DSCP/],
    [["-d=EF"], /"=EF" is not a DSCP/],
    [["--header=A: b=c\u2028d"], { headers: [["A", "b=c\u2028d"]] }],
    [["-HA:\u00a0b\u2028"], { headers: [["A", "\u00a0b\u2028"]] }],
    [["--dscp="], /an empty text is not a DSCP/],
    [["--dscp"], /^--dscp needs a value$/],
    [["-d"], /^-d needs a value$/],
    [["-sd"], /^-d needs a value$/],
    [["--json="], /^--json takes no value$/],
    [["--json=1"], /^--json takes no value$/],
    [["--dscp=EF", "--json"], { marks: [0xb8], json: true }],
    [["--js"], /^unknown option '--js'$/],
    [["---json"], /^unknown option '---json'$/],
    [["--=x"], /^unknown option '--'$/],
    [["-😀"], /^unknown option '-😀'$/],
    [["-s😀"], /^unknown option '-😀'$/],
    [["-s-"], /^unknown option '-s-'$/],
    [["-si-"], /^unknown option '-i-'$/],
    [["-ds-"], /"s-" is not a DSCP/],
    [["-46"], { family: 6 }],
    [["-64"], { family: 4 }],
    [["-sSfi"], { silent: true, fail: true, include: true }],
    [["-k"], { insecure: true }],
    [["--insecure"], { insecure: true }],
    [["--cacert", "-"], { cacert: "-" }],
    [["--mark-syn"], { markSyn: true }],
    [["--require-proof"], { requireProof: true }],
    // Marks
    [["-d", "0"], { marks: [0] }],
    [["-d", "63"], { marks: [252] }],
    [["-d", "64"], /"64" is not a DSCP/],
    [["-d", " ef ,\tdf"], { marks: [0xb8, 0] }],
    [["-d", "EF,"], /an empty text is not a DSCP/],
    [["-d", "EF", "-d", "EF"], { marks: [0xb8, 0xb8] }],
    [["-d", "NQB,45,0x2D"], { marks: [0xb4, 0xb4, 0xb4] }],
    [["-d", "0x2e"], { marks: [0xb8] }],
    [["-d", "0x3F"], { marks: [0xfc] }],
    [["-d", "0x40"], /"0x40" is not a DSCP/],
    [["-d", "All"], { marks: Array.from({ length: 64 }, (_, dscp) => dscp * 4) }],
    [["--tos", "0"], { marks: [0] }],
    [["--tos", "252"], { marks: [252] }],
    [["--tos", "256"], /"256" is not a ToS byte/],
    [["--tos", "0xFC"], { marks: [252] }],
    [["--tos", "4", "--tos", "8"], { marks: [8] }],
    [["-d", "EF", "--tos", "4"], /^--dscp and --tos are mutually exclusive/],
    [["--ip-tos", "4", "-d", "EF"], /^--dscp and --ip-tos are mutually exclusive/],
    [["--ip-tos", "4", "--tos", "4"], /^--tos and --ip-tos are mutually exclusive/],
    [["--ip-tos", "184"], { marks: [0xb8] }],
    [["--ip-tos", "LowDelay"], { marks: [0x10] }],
    [["--ip-tos", "46"], /^ToS 0x2E sets ECN bits/],
    [["--ip-tos", "EF,DF"], /^"EF,DF" is not a ToS byte/],
    // What is to arrive
    [["--expect", "EF"], { expect: ["EF"] }],
    [["--expect", "EF", "-n", "2"], { expect: ["EF"], count: 2 }],
    [["--expect", "AF41,DF", "-d", "EF,CS1"], { expect: ["AF41", "DF"], marks: [0xb8, 0x20] }],
    [["-d", "EF,CS1", "--expect=DF", "--expect=LE"], { expect: ["DF", "LE"], marks: [0xb8, 0x20] }],
    [["-d", "EF,CS1", "--expect", "DF"], { expect: ["DF"], marks: [0xb8, 0x20] }],
    [["--tos", "0", "--expect", "EF"], { expect: ["EF"], marks: [0] }],
    [["--expect", "EF,DF"], /^--expect takes one mark, or one for each of -d, not 2 for 1 mark$/],
    [["-d", "EF,DF", "--expect", "EF,DF,LE"], /^--expect takes .*, not 3 for 2 marks$/],
    [["-d", "EF,DF,LE", "--expect", "EF,DF"], /^--expect takes .*, not 2 for 3 marks$/],
    [["--expect", "x"], /"x" is not a DSCP/],
    [["--expect", "EF", "--trace"], /^--expect does nothing here: a trace shows what each router/],
    // Whole numbers
    [["-n", "1"], {}],
    [["-n", "2"], { count: 2 }],
    [["-n", "1000000"], { count: 1_000_000 }],
    [["-n", "1000001"], /^-n takes a number from 1 to 1000000, not '1000001'$/],
    ...["0", "-1", "01", "+1", "1.0", "1e3", "0x1", "", " 1", "1\n"].map((text) =>
      [["-n", text], /^-n takes a number from 1 to 1000000, not '/] as const
    ),
    [["--trace", "--max-hops", "1"], { trace: true, maxHops: 1, connectTimeout: 60 }],
    [["--trace", "--max-hops", "64"], { trace: true, maxHops: 64, connectTimeout: 60 }],
    [["--trace", "--max-hops", "65"], /^--max-hops takes a number from 1 to 64, not '65'$/],
    // Seconds
    [["-m", "0"], { maxTime: 0 }],
    [["-m", ".5"], { maxTime: 0.5 }],
    [["-m", "5."], { maxTime: 5 }],
    [["-m", "007.50"], { maxTime: 7.5 }],
    [["-m", `${MAX}`], { maxTime: MAX }],
    [["-m", `${MAX}.0`], { maxTime: MAX }],
    [["--connect-timeout", "0.001"], { connectTimeout: 0.001 }],
    [["-n2", "--interval", "3"], { count: 2, interval: 3 }],
    ...[`${MAX}.1`, `${MAX + 1}`, ".", "", "-1", "+1", "1e3", "5s", "Infinity", "1,5", "1\n"].map(
      (text) =>
        [["-m", text], /^-m takes seconds from 0 to 2147483, such as 5 or 0\.5, not '/] as const,
    ),
    [["--interval", "x"], /^--interval takes seconds/],
    // The limit on connecting of a trace
    [["--trace"], { trace: true, connectTimeout: 60 }],
    [["--trace", "-m", "5"], { trace: true, maxTime: 5, connectTimeout: 5 }],
    [["--trace", "-m", "0.5"], { trace: true, maxTime: 0.5, connectTimeout: 0.5 }],
    [["--trace", "-m", "60"], { trace: true, maxTime: 60, connectTimeout: 60 }],
    [["--trace", "-m", "61"], { trace: true, maxTime: 61, connectTimeout: 60 }],
    [["--trace", "-m", "0"], { trace: true, maxTime: 0, connectTimeout: 60 }],
    [["--trace", "--connect-timeout", "99"], { trace: true, connectTimeout: 99 }],
    [["--trace", "--connect-timeout", "0", "-m", "5"], {
      trace: true,
      maxTime: 5,
      connectTimeout: 0,
    }],
    [["-m", "5"], { maxTime: 5 }],
    // Where to listen
    [["--serve", "0"], { serve: { hostname: "127.0.0.1", port: 0 } }],
    [["--serve", "65535"], { serve: { hostname: "127.0.0.1", port: 65535 } }],
    [["--serve", "00080"], { serve: { hostname: "127.0.0.1", port: 80 } }],
    [["--serve", ":8086"], { serve: { hostname: "::", port: 8086 } }],
    [["--serve", "*:8086"], { serve: { hostname: "::", port: 8086 } }],
    [["--serve", "a.b:1"], { serve: { hostname: "a.b", port: 1 } }],
    [["--serve", "[::]:1"], { serve: { hostname: "::", port: 1 } }],
    [["--serve", "[fe80::1%25lo]:1"], { serve: { hostname: "fe80::1%lo", port: 1 } }],
    [["--serve", "[fe80::1%lo]:1"], { serve: { hostname: "fe80::1%lo", port: 1 } }],
    [["--serve", "[fe80::1%25]:1"], { serve: { hostname: "fe80::1%25", port: 1 } }],
    ...[
      "65536",
      "99999",
      "100000",
      "000080",
      "",
      "a:",
      "[]:1",
      "::1:1",
      "[::1]1",
      "[a:1",
      "a]:1",
      "a:65536",
      "x",
      "-1",
    ]
      .map((text) =>
        [
          ["--serve", text],
          /^--serve takes PORT, :PORT, HOST:PORT or \[IPv6\]:PORT, PORT from 0 to 65535/,
        ] as const
      ),
    // What goes together
    [["--serve", "1", "-sS"], { serve: { hostname: "127.0.0.1", port: 1 }, silent: true }],
    [["--serve", "1", "--silent", "--show-error"], {
      serve: { hostname: "127.0.0.1", port: 1 },
      silent: true,
    }],
    [["--serve", "1", "-d", "EF"], {
      serve: { hostname: "127.0.0.1", port: 1 },
      replyMark: { name: "EF", dscp: 46, tos: 0xb8 },
      marks: [0xb8],
    }],
    [["--tos", "0", "--serve", "1"], {
      serve: { hostname: "127.0.0.1", port: 1 },
      replyMark: { name: "DF", dscp: 0, tos: 0 },
      marks: [0],
    }],
    [["--ip-tos", "LE", "--serve", "1"], {
      serve: { hostname: "127.0.0.1", port: 1 },
      replyMark: { name: "LE", dscp: 1, tos: 4 },
      marks: [4],
    }],
    [["--serve", "1", "-d", "EF,DF"], /^--serve takes one mark for its replies, not 2$/],
    [["--serve", "1", "-d", "all"], /^--serve takes one mark for its replies, not 64$/],
    [["--serve", "1", "h"], /^--serve takes no URL/],
    [["-n", "1", "--interval", "2"], { interval: 2 }],
    [["-d", "EF,DF", "--interval", "2"], { marks: [0xb8, 0], interval: 2 }],
    [["--trace", "-n", "1"], /^--trace and --count are mutually exclusive/],
    [["-n", "1", "-i"], { include: true }],
    [["--json", "-f"], { json: true, fail: true }],
    // Only text is asked for; the first one is printed
    [["-hV"], { print: "help" }],
    [["-Vh"], { print: "version" }],
    [["--completions", "fish", "-hV"], { print: "fish" }],
    [["-h", "--completions", "zsh"], { print: "help" }],
    [["-h", "--completions", "tcsh"], { print: "help" }],
    [["--completions", "bash"], { print: "bash" }],
    [["--completions", "BASH"], /^--completions takes bash, zsh or fish, not 'BASH'$/],
    [["-h", "-d", "EF", "AF41"], { print: "help", marks: [0xb8], url: "AF41" }],
    // Bytes that are not UTF-8 come as U+FFFD
    [["http://h/\ufffd"], /^'http:\/\/h\/\ufffd' is not UTF-8, or contains U\+FFFD$/],
    [["-H", "A: \ufffd", "-h"], /^'A: \ufffd' is not UTF-8, or contains U\+FFFD$/],
    [["-h", "-d", "EF", "--tos", "4"], { print: "help", marks: [4] }],
  ] as readonly (readonly [string[], object | RegExp])[]
) {
  Deno.test(`arguments: ${JSON.stringify(args)}`, () => {
    if (!(expected instanceof RegExp)) return assert.deepEqual(changed(args), expected);
    assert.throws(() => parseArguments(args), (error) => {
      assert.ok(error instanceof Failure);
      assert.equal(error.code, Exit.usage);
      assert.match(error.message, expected);
      assert.doesNotMatch(error.message, /\p{Cc}/u);
      return true;
    });
  });
}

/** A value that each option takes. */
const VALUES: Record<string, string> = {
  "NAME[,NAME…]": "EF",
  "NAME[,…]": "EF",
  BYTE: "8",
  LINE: "A: b",
  S: "1",
  FILE: "f",
  N: "2",
  SHELL: "fish",
  "[HOST:]PORT": "1",
};

/** The options one by one, each with a value: `--count=2`. */
const EACH = optionRows().map(({ flags, value }) => ({
  name: flags.at(-1)!,
  word: value === "" ? flags.at(-1)! : `${flags.at(-1)}=${VALUES[value]}`,
}));

Deno.test("each option does something, under each of its names", () => {
  const nothing = ["--dscp", "--show-error"];
  for (const { flags, value } of optionRows()) {
    for (const flag of flags) {
      const args = [flag, ...value === "" ? [] : [VALUES[value]]];
      // What an option needs beside it.
      if (flag === "--max-hops") args.push("--trace");
      if (flag === "--interval") args.push("-n2");
      const changes = Object.keys(changed(args)).length;
      assert.equal(
        changes > 0,
        !nothing.includes(flags.at(-1)!) || flag === "-d" || flag === "--dscp",
        flag,
      );
    }
  }
});

Deno.test("beside --serve each option is refused by its name, but for -s, -S, marks, and those that print", () => {
  const allowed =
    "--serve --silent --show-error --help --version --completions --dscp --tos --ip-tos".split(" ");
  for (const { name, word } of EACH) {
    for (const args of [["--serve", "1", word], [word, "--serve", "1"]]) {
      if (allowed.includes(name)) parseArguments(args);
      else {
        const message = `${name} cannot be combined with --serve: it is for requests`;
        assert.throws(() => parseArguments(args), { code: 2, message });
      }
    }
  }
});

Deno.test("an option that would do nothing is refused, and says what it is for", () => {
  const url = "http://192.0.2.1/";
  for (
    const [words, why] of [
      [`--max-hops 5 ${url}`, "--max-hops does nothing here: it is for --trace"],
      [`-n 2 --max-hops 5 ${url}`, "--max-hops does nothing here: it is for --trace"],
      [`--interval 1 ${url}`, "--interval does nothing here: it is for series"],
      [`--trace --interval 1 ${url}`, "--interval does nothing here: it is for series"],
      [`--trace --interval 1 -d EF,DF ${url}`, "--interval does nothing here: it is for series"],
      [`-i --json ${url}`, "--include does nothing here: no reply is printed in a series"],
      [`-i -n 2 ${url}`, "--include does nothing here: no reply is printed in a series"],
      [`-i -d EF,DF ${url}`, "--include does nothing here: no reply is printed in a series"],
      [`--trace -i ${url}`, "--include does nothing here: no reply is printed in a series"],
    ]
  ) {
    assert.throws(() => parseArguments(words.split(" ")), (error) => {
      assert.ok(error instanceof Failure);
      assert.equal(error.code, 2);
      assert.ok(error.message.startsWith(why), error.message);
      return true;
    });
  }
});

for (
  const [text, header] of [
    ["A: b", ["A", "b"]],
    ["A:b", ["A", "b"]],
    ["A:  b c \t", ["A", "b c"]],
    ["A: b: c; d", ["A", "b: c; d"]],
    ["A:", ["A", null]],
    ["A: \t", ["A", null]],
    ["A;", ["A", ""]],
    ["A; ", ["A", ""]],
    ["!#$%&'*+.^_`|~09AZaz-: x", ["!#$%&'*+.^_`|~09AZaz-", "x"]],
    ["A; b", null],
    ["A;:", null],
    ["A", null],
    ["", null],
    [":", null],
    [": x", null],
    [" A: x", null],
    ["A : x", null],
    ["A,: x", null],
    ["A\x7f: x", null],
    ["Ä: x", null],
    ...[...'"(),/<=>?@[\\]{}'].map((c) => [`A${c}: x`, null] as const),
    ["A: \u00a0ü€\u3000", ["A", "\u00a0ü€\u3000"]],
    ["A: \x01\x7f", ["A", "\x01\x7f"]],
    ["A:\u00a0", ["A", "\u00a0"]],
    ["A;\u00a0", null],
    ["A: \ud800", null],
    ["A: x\r", null],
    ["A: x\ny", null],
    ["A: x\0", null],
  ] as const
) {
  Deno.test(`the header ${JSON.stringify(text)}`, () => {
    if (header !== null) return assert.deepEqual(parseArguments(["-H", text]).headers, [header]);
    assert.throws(() => parseArguments(["-H", text]), { code: 2, message: /is not a header: / });
  });
}

Deno.test("a program's options: defaults for what is left out, and the same checks", () => {
  const defaults = { headers: [], connectTimeout: 10, maxTime: 30, dscp: "EF" };
  assert.deepEqual(withDefaults(defaults, {}), defaults);
  assert.deepEqual(withDefaults(defaults, { dscp: undefined, maxTime: 0 }), {
    ...defaults,
    maxTime: 0,
  });
  for (const limit of [0, 0.5, MAX]) {
    assert.equal(withDefaults(defaults, { connectTimeout: limit }).connectTimeout, limit);
  }
  for (const limit of [-1, -0.001, MAX + 1, NaN, Infinity]) {
    const error = {
      name: "RangeError",
      message: `${limit} is no time limit; allowed are 0 to ${MAX} seconds`,
    };
    assert.throws(() => withDefaults(defaults, { connectTimeout: limit }), error);
    assert.throws(() => withDefaults(defaults, { maxTime: limit }), error);
  }
  for (const header of [["A b", "c"], ["A", "b\n"], ["", null]]) {
    assert.throws(() => withDefaults(defaults, { headers: [header] }), { code: 2 });
  }
  assert.deepEqual(withDefaults(defaults, { headers: [["A", null]] }).headers, [["A", null]]);
});

Deno.test("what is to arrive is one mark for all, one for each, or what is sent", async () => {
  for (
    const [args, names] of [
      ["-d EF,DF", [undefined, undefined]],
      ["-d EF,DF --expect LE", ["LE", "LE"]],
      ["-d EF,DF --expect LE,CS1", ["LE", "CS1"]],
    ] as const
  ) {
    const options = parseArguments(args.split(" "));
    assert.deepEqual([0, 1].map((at) => expectedOf(options, at)?.name), names);
    assert.equal((await requestOptionsOf(options)).expect?.name, names[0]);
  }
});

// ─── Hints ───────────────────────────────────────────────────────────────────────────────────────

for (
  const [args, hint] of [
    ["--tos 46", "did you mean -d EF?"],
    ["--tos EF", "did you mean -d EF?"],
    ["--tos be", "did you mean -d DF?"],
    ["--tos 10", "did you mean -d AF11?"],
    ["--tos 63", "did you mean -d 63?"],
    ["--tos 0x2e", "did you mean -d EF?"],
    ["--tos b8", "did you mean hexadecimal? --tos 0xb8"],
    ["--tos B8", "did you mean hexadecimal? --tos 0xB8"],
    ["--tos 0c", "did you mean hexadecimal? --tos 0x0c"],
    ["--tos 90", "did you mean hexadecimal? --tos 0x90"],
    ["--tos b9", "--help lists the options"],
    ["--tos b80", "--help lists the options"],
    ["--tos x", "--help lists the options"],
    ["-d 0xb8", "if the whole byte is meant: --tos 0xB8, which is EF"],
    ["-d 184", "if the whole byte is meant: --tos 0xB8, which is EF"],
    ["-d 64", "if the whole byte is meant: --tos 0x40, which is CS2"],
    ["-d 252", "if the whole byte is meant: --tos 0xFC, which is DSCP 63"],
    ["-d 186", "--help lists the options"],
    ["-d 256", "--help lists the options"],
    ["-d EF,", "-d takes one list, with commas and without blanks: -d EF,AF41"],
    ["-d EF, AF41", "-d takes one list, with commas and without blanks: -d EF,AF41"],
    ["-d EF AF41", "-d takes one list, with commas and without blanks: -d EF,AF41"],
    ["-d EF AF41 http://h/", "-d takes one list, with commas and without blanks: -d EF,AF41"],
    ["-d EF http://h/ 46", "-d takes one list, with commas and without blanks: -d EF,AF41"],
    ["EF", "did you mean -d EF?"],
    ["af41 http://h/", "did you mean -d af41?"],
    ["-n 2 va", "did you mean -d va?"],
    ["--expect 184", "if the whole byte is meant: --tos 0xB8, which is EF"],
    ["--ip-tos x", "--help lists the options"],
  ]
) {
  Deno.test(`the hint on '${args}'`, () => {
    assert.throws(() => parseArguments(args.split(" ")), (error) => {
      assert.ok(error instanceof Failure);
      assert.deepEqual([error.code, error.hint], [2, hint]);
      return true;
    });
  });
}

Deno.test("a host that is called like a mark is asked by its URL", () => {
  for (const url of ["http://ef/", "ef/", "ef:80", "46", "ef.example"]) {
    assert.equal(parseArguments([url]).url, url);
  }
  assert.equal(parseArguments(["-d", "EF", "ef/"]).url, "ef/");
  const message = "'EF' is a mark, not a URL; a host of that name is http://EF/";
  assert.throws(() => parseArguments(["EF"]), { message });
});

/** curl's options, each with a word of what the hint says. */
const CURLS: Record<string, RegExp> = {
  "-v --verbose": /report.*--json/,
  "-L --location": /not followed/,
  "-o --output -O --remote-name": />FILE/,
  "-x --proxy": /no proxy/,
  "-X --request -G --get -F --form -T --upload-file": /^requests are GET and have no body$/,
  "--data --data-raw --data-binary --data-urlencode": /^requests are GET and have no body$/,
  "-I --head": /^requests are GET.*-i/,
  "-u --user": /Authorization/,
  "-A --user-agent": /^-H 'User-Agent: …'/,
  "-e --referer": /^-H 'Referer: …'/,
  "-b --cookie": /^-H 'Cookie: …'/,
  "-c --cookie-jar": /not kept/,
  "-r --range": /^-H 'Range: …'/,
  "--compressed": /Accept-Encoding/,
  "-w --write-out": /--json/,
  "--resolve --connect-to": /URL.*Host/,
  "--interface": /routes/,
  "-E --key": /certificates/,
  "--http1.0 --http1.1 --http2 --http3": /HTTP\/1\.1/,
  "--retry": /-n/,
  "--path-as-is": /always/,
  "--mark": /-d .*--mark-syn/,
};

for (const [flags, words] of Object.entries(CURLS)) {
  Deno.test(`the hint on curl's ${flags}`, () => {
    for (const flag of flags.split(" ")) {
      for (const args of [[flag, "x"], ["-s", flag]]) {
        assert.throws(() => parseArguments(args), (error) => {
          assert.ok(error instanceof Failure);
          assert.deepEqual([error.code, error.message], [2, `unknown option '${flag}'`]);
          assert.match(error.hint ?? "", words);
          return true;
        });
      }
    }
  });
}

Deno.test("an unknown option gets the nearest name, if that is near", () => {
  const names = optionRows().map(({ flags }) => flags.at(-1)!);
  for (
    const [given, hint] of [
      ["--dcsp", "did you mean --dscp?"],
      ["--dscpp", "did you mean --dscp?"],
      ["--dsc", "did you mean --dscp?"],
      ["--dsxx", "did you mean --dscp?"],
      ["--dxxx", "--help lists the options"],
      ["--mark-sin", "did you mean --mark-syn?"],
      ["--marc-sin", "did you mean --mark-syn?"],
      ["--conect-timeot", "did you mean --connect-timeout?"],
      ["--conect-tineot", "did you mean --connect-timeout?"],
      ["--conect-tineoh", "--help lists the options"],
      ["--connect-timeoutxyz", "did you mean --connect-timeout?"],
      ["--connect-time", "did you mean --connect-timeout?"],
      ["--ect-timeout", "--help lists the options"],
      ["--require-prof", "did you mean --require-proof?"],
      ["--jsno", "did you mean --json?"],
      ["--interwal", "did you mean --interval?"],
      ["--tosses", "--help lists the options"],
      ["-json", "--help lists the options"],
      ["-4-", "--help lists the options"],
      ["--", "--help lists the options"],
    ]
  ) {
    const { code, message, hint: said } = unknownOption(given, names);
    assert.deepEqual([code, message, said], [2, `unknown option '${given}'`, hint]);
  }
  assert.equal(unknownOption("--json", []).hint, "--help lists the options");
  const { hint } = unknownOption("--abcdef", ["--abcdxx", "--abcdex", "--abcxxx"]);
  assert.equal(hint, "did you mean --abcdex?");
});

Deno.test("an option of Deno gets the hint that it belongs before main.ts", () => {
  const names =
    "--allow-net --allow-ffi --deny-read --unstable-net --no-prompt --no-check --quiet --reload --config --cert --v8-flags";
  for (const name of names.split(" ")) {
    const { hint } = unknownOption(name, ["--silent"]);
    assert.equal(hint, "options of Deno go before main.ts: deno run --allow-net …", name);
  }
  for (const name of ["--a", "--no", "-allow-net", "--x-allow-net"]) {
    assert.equal(unknownOption(name, ["--silent"]).hint, "--help lists the options", name);
  }
});

Deno.test("--serve :PORT and '*:PORT' listen on all addresses", async () => {
  for (const where of [":0", "*:0"]) {
    await using far = await FarEnd.start(where);
    for (const host of ["127.0.0.1", "127.0.0.2", "[::1]"]) {
      const { code, stderr } = await dscpGet(["-s", `http://${host}:${far.port}/`]);
      assert.deepEqual([code, stderr], [0, ""], `${where} ${host}`);
    }
  }
});

Deno.test("a header that is refused is told what its name may have", () => {
  const message = "'A b: c' is not a header: its name must be letters, digits or " +
    "!#$%&'*+-.^_`|~, as in 'Name: value'";
  assert.throws(() => parseArguments(["-H", "A b: c"]), { message });
});

Deno.test("a port below 1024 that a user may not have gets the hint that it is one of those", () => {
  const { PermissionDenied, AddrInUse } = Deno.errors;
  const hintOf = (error: Error, port: number) =>
    failureOf(error, "listening", { hostname: "::", port }).hint;
  for (const port of [1, 80, 1023]) {
    assert.match(hintOf(new PermissionDenied("x"), port)!, /^ports below 1024 need root/);
    assert.equal(hintOf(new AddrInUse("x"), port), undefined);
  }
  assert.equal(hintOf(new PermissionDenied("x"), 1024), undefined);
});

testWith(
  ["root", "ip", "setpriv"],
  "--serve 80 as nobody: 7, and which ports that is about",
  async () => {
    await using namespace = await Namespace.create();
    await using nobody = await Nobody.create();
    const { code, stderr } = await execute([
      ...namespace.under,
      ...nobody.command,
      "--serve",
      "80",
    ]);
    assert.equal(code, 7);
    assert.match(
      stderr,
      /^dscp-get: cannot listen on 127\.0\.0\.1:80: permission denied\nhint: ports below 1024 /,
    );
  },
);

// ─── Help ────────────────────────────────────────────────────────────────────────────────────────

/** The `import.meta` of a script that was started in some way. */
function startedAs(url: string, ownName: string | null): ImportMeta {
  const resolve = (name: string) => {
    if (name === ownName) return url;
    throw new TypeError(name);
  };
  return { url, main: true, resolve } as ImportMeta;
}

Deno.test("the help fits every width from 40 columns up and names every option", () => {
  const meta = startedAs("file:///x/main.ts", "@dscp-get/dscp-get");
  for (const width of [40, 50, 71, 72, 80, 200]) {
    const text = usage(width, meta);
    for (const line of text.split("\n")) {
      const isLabel = /^ {2}(-.| {2})/.test(line);
      assert.ok(
        [...line].length <= width || isLabel && !line.includes("  ", 6),
        `${width}: ${line}`,
      );
    }
    for (const label of Object.values(OPTIONS).flatMap(Object.keys)) {
      assert.ok(text.includes(`\n  ${label}`), label);
    }
    assert.doesNotMatch(text, /\xa0| \n|\n\n\n/);
  }
  assert.match(usage(72, meta), /^ {2}-4, --ipv4 {14}IPv4 addresses only$/m);
  assert.match(usage(71, meta), /^ {2}-4, --ipv4\n {8}IPv4 addresses only$/m);
  assert.match(usage(80, meta), /^ {2}-d, --dscp NAME\[,NAME…\] EF /m);
});

Deno.test("the help shows how the script was started", () => {
  const run = "deno run --allow-net --allow-ffi";
  for (
    const [meta, words] of [
      [startedAs("https://h.example/main.ts", null), `${run} https://h.example/main.ts`],
      [
        startedAs("https://h.example/\x1b.ts", "@dscp-get/dscp-get"),
        `${run} https://h.example/\\x1b.ts`,
      ],
      [startedAs("file:///x/main.ts", "@dscp-get/dscp-get"), `${run} main.ts`],
      [startedAs("file:///x/main.ts", "@other/dscp-get"), "dscp-get"],
    ] as const
  ) assert.ok(usage(120, meta).includes(`\n  ${words} [options] [URL]\n`), words);
});

// ─── Certificates ────────────────────────────────────────────────────────────────────────────────

Deno.test("requests trust the usual roots, or what -k and --cacert say", async () => {
  const trust = async (...args: string[]) => (await requestOptionsOf(parseArguments(args))).trust;
  assert.equal(await trust(), null);
  assert.deepEqual(await trust("-k"), { caCerts: [], insecure: true });
  await assert.rejects(trust("--cacert", ""), { code: 77, message: /needs the name of a file/ });
  await assert.rejects(trust("--cacert", "/does/not/exist"), { code: 77, message: /cannot read/ });
});

testWith(["openssl"], "of --cacert's file each certificate counts, and nothing else", async () => {
  await using certificates = await Certificates.create();
  const pem = (await Deno.readTextFile(certificates.root)).trim();
  const folder = await Deno.makeTempDir({ prefix: "dscp-get-" });
  try {
    const read = async (text: string) => {
      await Deno.writeTextFile(`${folder}/pem`, text);
      return (await requestOptionsOf(parseArguments(["--cacert", `${folder}/pem`]))).trust?.caCerts;
    };
    assert.deepEqual(await read(pem), [pem]);
    assert.deepEqual(await read(`a comment\n${pem}\n${pem}\n`), [`${pem}\n`, `${pem}\n`]);
    await assert.rejects(read(""), { code: 77, message: /holds no certificate in PEM form/ });
    await assert.rejects(read(`x${pem}`), { code: 77, message: /holds no certificate/ });
    const broken = pem.replace(/\n.{8}/, "\nAAAAAAAA");
    await assert.rejects(read(`${pem}\n${broken}`), {
      code: 77,
      message: /^certificate 2 in .* is broken$/,
    });
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
