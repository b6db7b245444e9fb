import assert from "node:assert/strict";
import { Exit, Failure, get } from "../main.ts";
import { parseArguments } from "../src/options.ts";
import { parseTarget } from "../src/target.ts";
import { dscpGet, execute, testWith } from "./support/processes.ts";
import { Random, SEED } from "./support/random.ts";
import { closedPort, latin1, RawServer, readRequest, replying, send } from "./support/servers.ts";

// ─── Replies ─────────────────────────────────────────────────────────────────────────────────────────────────────────

/** A reply as a server might send it, well-formed or broken, a character a byte. */
function reply(random: Random): string {
  const eol = random.mostly("\r\n", "\n");
  const status = random.mostly(..."200 404 204 304 500 299 999 099 20 2000 2x0".split(" "));
  const reason = random.mostly("OK", "", "\x1b[31mred", "a\0b", "\xff\xfe", "OK ".repeat(50));
  const version = random.mostly(
    ..."HTTP/1.1 HTTP/1.0 HTTP/1.2 HTTP/3.7 http/1.1 HTP/1.1 HTTP/1. ICY SSH-2.0 \r\nHTTP/1.1"
      .split(
        " ",
      ),
  );
  const separator = random.mostly(" ", " ", "  ", "\t");
  const interim = random.mostly(
    "",
    `HTTP/1.1 100 Continue${eol}${eol}`,
    `HTTP/1.1 103 Early Hints${eol}Link: x${eol}${eol}`,
    `HTTP/1.1 100 Continue${eol}Content-Length: x${eol}\r\r\n`.repeat(3),
  );
  const body = random.bytes(random.oneOf([0, 1, 2, 10, 100, 3000]));
  const headers = Array.from({ length: random.below(4) }, () =>
    random.mostly(
      `X-${random.below(99)}: ${random.below(99)}`,
      "X-Empty:",
      `X-Folded: a${eol} b`,
      "No colon",
      ": no name",
      "X-Nul: a\0b",
      "X-Space : a",
      "X-Escape: \x1b[2J",
      " starts with space",
      " X-First: folded",
      "\tX-First: folded",
      "X-CR: a\r",
      "X-CR: a\rb",
      "\rX-CR: a",
      "X-Long: " + "y".repeat(5000),
    ));
  const framed = frame(random, body, eol, headers);
  const blank = random.mostly(eol, eol, "\r\r\n", "\r\r\r\n", " \r\n");
  const whole =
    `${interim}${version}${separator}${status}${reason === "" ? "" : ` ${reason}`}${eol}` +
    `${headers.map((header) => header + eol).join("")}${blank}${framed}${
      random.mostly("", "trailing garbage", "\r\n\r\n", "\0")
    }`;
  const end = random.below(2) === 0 ? whole.length : interim.length + 30;
  return random.below(8) === 0 ? whole.slice(0, random.below(end + 1)) : whole;
}

/** The body as it goes out, with the headers that tell how. */
function frame(random: Random, body: string, eol: string, headers: string[]): string {
  const size = String(body.length);
  switch (random.below(3)) {
    case 0:
      return body; // until the connection closes
    case 1: {
      const lengths =
        `${size}|0${size}| ${size}  |+${size}|-${size}|${body.length + 7}||x|${size}x|${size} 7|` +
        `99999999999999999999|${size}, ${size}|${size}, 7777|${size}, 0${size}|${size},|,${size}|` +
        `${eol} ${size}|${size},${eol}\t${size}`;
      const length = random.mostly(...lengths.split("|"));
      headers.splice(
        random.below(headers.length + 1),
        0,
        `${random.oneOf(["Content-Length", "content-length"])}: ${length}`,
      );
      const again = random.mostly("", size, "7777");
      if (again !== "") headers.push(`Content-Length: ${again}`);
      return body;
    }
    default: {
      const codings = "chunked|Chunked|identity|gzip|gzip, chunked|chunked, chunked|chunked;q=1||" +
        `identity, chunked|chunked, identity|identity, identity|${eol} chunked|identity,${eol}\tchunked`;
      headers.push(`Transfer-Encoding: ${random.mostly(...codings.split("|"))}`);
      if (random.below(6) === 0) headers.push(`Content-Length: ${random.oneOf([size, "3"])}`);
      let text = "";
      for (let at = 0; at < body.length;) {
        const piece = body.slice(at, at += 1 + random.below(random.oneOf([3, 50, 4000])));
        const hex = piece.length.toString(16);
        const sizes = `${hex}|${hex.toUpperCase()}|000${hex}|${hex};a=b|${hex} ;a="b;c"|${hex} |` +
          ` ${hex}|0x${hex}||g|ffffffffffffffff|fffffffffffffffff1|-${hex}|${hex}x|${hex};\0|` +
          `${hex.padStart(16, "0")}|${hex.padStart(17, "0")}|${hex}\r`;
        const written = random.mostly(...sizes.split("|"));
        text += `${random.below(20) === 0 ? written : hex}${eol}${piece}${
          random.below(30) === 0 ? random.oneOf(["", "\n", "x\r\n", "\r", "\r\r\n"]) : eol
        }`;
      }
      const trailers =
        "|X-Trailer: 1|X-Trailer:|X-Trailer: a\0b|No colon| X-First: folded| folded|" +
        `X-Folded: a${eol} b${eol}\tc|X: 1${eol}Y: 2|X-CR: a\rb|X: 1${eol}\r|\rX: 1`;
      const trailer = random.mostly(...trailers.split("|").map((text) => text && `${text}${eol}`));
      return `${text}${random.mostly("0", "00", "0;x", "")}${eol}${trailer}${
        random.mostly(eol, "")
      }`;
    }
  }
}

/** What became of a reply: the body where it was accepted, else `null`. */
type Verdict = { readonly body: string | null; readonly code: number; readonly why: string };

/**
 * A server that sends the reply that the path asks for: to us in two pieces, cut anywhere, to curl in one, as curl 7.88
 * at times takes a status line that comes in two for HTTP/0.9, and with the folds undone that it does not read.
 */
function serving(replies: readonly string[]): RawServer {
  return new RawServer(async (conn) => {
    const text = await readRequest(conn);
    const at = Number(/^GET \/(\d+) /.exec(text)![1]);
    const isCurl = /^User-Agent: curl/m.test(text);
    const bytes = latin1(isCurl ? unfolded(replies[at]) : replies[at]);
    const cut = isCurl ? bytes.length : at % (bytes.length + 1);
    await send(conn, bytes.subarray(0, cut));
    await send(conn, bytes.subarray(cut));
  });
}

function isEmpty({ code }: Verdict): boolean {
  return code === Exit.emptyReply;
}

async function oursOf(url: string): Promise<Verdict> {
  const body: string[] = [];
  const decoder = new TextDecoder("latin1");
  const sink = {
    head() {},
    begin() {},
    body: (piece: Uint8Array) => void body.push(decoder.decode(piece)),
  };
  try {
    await get(url, { maxTime: 5 }, sink);
    return { body: body.join(""), code: 0, why: "" };
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    const codes: number[] = [Exit.badReply, Exit.endedEarly, Exit.emptyReply, Exit.connectionLost];
    assert.ok(codes.includes(error.code), `${error.code}: ${error.message}`);
    assert.doesNotMatch(error.message, /\p{Cc}/u);
    return { body: null, code: error.code, why: error.message };
  }
}

/** What curl makes of them, in as few processes as it takes: after some errors it leaves the rest undone. */
async function curlOf(urls: readonly string[], folder: string): Promise<Verdict[]> {
  const verdicts: Verdict[] = [];
  while (verdicts.length < urls.length) {
    const left = urls.slice(verdicts.length, verdicts.length + 200);
    const config = left.map((url, at) => `url = "${url}"\noutput = "${folder}/${at}"`).join("\n");
    await Deno.writeTextFile(
      `${folder}/config`,
      `silent\nmax-time = 5\nwrite-out = "%{urlnum} %{exitcode}\\n"\n${config}\n`,
    );
    const { code, stdout } = await execute(["curl", "--disable", "--config", `${folder}/config`]);
    const codes = stdout.trim().split("\n").filter((line) => line !== "").map((line) =>
      Number(line.split(" ")[1])
    );
    if (codes.length < left.length && codes.at(-1) !== code) codes.push(code);
    assert.ok(codes.length > 0, `curl: exit ${code}`);
    for (const [at, code] of codes.entries()) {
      const file = `${folder}/${at}`;
      // An empty body leaves no file.
      const body = () => new TextDecoder("latin1").decode(Deno.readFileSync(file));
      const isThere = await Deno.stat(file).then(() => true, () => false);
      verdicts.push(
        code === 0
          ? { body: isThere ? body() : "", code, why: "" }
          : { body: null, code, why: `curl: ${code}` },
      );
      if (isThere) await Deno.remove(file);
    }
  }
  return verdicts;
}

/**
 * What we take and curl 7.88 does not, and why; there is nothing else. RFC 9112 section 5.2: a line that begins with a
 * blank continues the one before.
 */
const MORE_LENIENT: readonly (readonly [pattern: RegExp, unfolded: string, why: string])[] = [
  [
    /^(HTTP\/[^\n]*\n)[ \t]+/gm,
    "$1",
    "the first header has none before it; curl ends with an error of its own (43)",
  ],
  [
    /^(Content-Length:.*?)\r?\n[ \t]+/gmi,
    "$1 ",
    "curl looks at the first line alone, and refuses it where the number is on the second",
  ],
  [
    /^(Transfer-Encoding:.*?)\r?\n[ \t]+/gmi,
    "$1 ",
    "curl looks at the first line alone, and passes chunks on with their framing",
  ],
];

function unfolded(text: string): string {
  // A line that begins with CR ends the head, and what looks like a fold behind it is the body's.
  const [, head, rest] = /^([^]*?)((?:\n\rX[^]*)?)$/.exec(text)!;
  const undo = (text: string, [pattern, by]: typeof MORE_LENIENT[number]) =>
    text.replace(pattern, by);
  return MORE_LENIENT.reduce(undo, head) + rest;
}

/** Where we mean to be stricter than curl 7.88, and why. */
const STRICTER: readonly (readonly [pattern: RegExp, why: string])[] = [
  [
    /header line .* has no name and colon/,
    "RFC 9112 section 5: a field line has both; curl took such lines until version 8",
  ],
  [
    /ended early: in the middle of the headers/,
    "a reply that is cut in its head is never passed off as a whole one",
  ],
  [
    /Content-Length/,
    "RFC 9112 section 6.3: what is no number, or two of them, is not to be guessed at",
  ],
  [
    /Transfer-Encoding '(?!chunked(, chunked)*').*' was not asked for/,
    "RFC 9112 section 7: none but chunked may come unasked",
  ],
  [
    /bad chunk size '[0-9a-f]+[^0-9a-f]/i,
    "RFC 9112 section 7.1: extensions begin with a semicolon; curl reads on until the end of the line",
  ],
  [
    /a chunk is longer than its size/,
    "RFC 9112 section 7.1: CR LF, or LF alone, ends the data; curl takes any number of CRs",
  ],
  [
    /trailer line ' folded' has no name and colon/,
    "there is no line before the first one that it could continue",
  ],
  [
    /ended early: (before the last chunk|in the middle of the trailers)/,
    "curl takes the last line break for granted, RFC 9112 section 7.1 does not",
  ],
  [
    /starts with 'http\//,
    "RFC 9112 section 2.3: the name is written in capitals; curl reads what follows as it may",
  ],
  [/status 0\d\d/, "RFC 9110 section 15: a status has three digits from 100 up"],
];

testWith(
  ["curl"],
  "five thousand replies, well-formed and broken, are taken and refused as curl does",
  async () => {
    const CASES = Number(Deno.env.get("CASES") ?? 5000);
    const random = new Random(SEED);
    const replies = Array.from({ length: CASES }, () => reply(random));
    await using server = serving(replies);
    const urls = replies.map((_, at) => `${server.url}${at}`);
    const folder = await Deno.makeTempDir({ prefix: "dscp-get-fuzz-" });
    try {
      const curls = await curlOf(urls, folder);
      const differing: unknown[] = [];
      for (const [at, text] of replies.entries()) {
        const ours = await oursOf(urls[at]);
        if (
          (ours.body === curls[at].body && (isEmpty(curls[at]) || !isEmpty(ours))) ||
          STRICTER.some(([pattern]) => ours.body === null && pattern.test(ours.why))
        ) {
          continue;
        }
        differing.push({ at, reply: text.slice(0, 300), ours, curl: curls[at] });
      }
      assert.deepEqual(differing.slice(0, 3), [], `SEED=${SEED}, ${differing.length} differ`);
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  },
);

testWith(
  ["curl"],
  "folds that curl refuses or passes over are read as RFC 9112 has them",
  async () => {
    const chunks = "5\r\nhello\r\n0\r\n\r\n";
    const replies = [
      "HTTP/1.1 200 OK\r\n X-First: a\r\nContent-Length: 5\r\n\r\nhello",
      "HTTP/1.1 200 OK\r\nContent-Length:\r\n 5\r\n\r\nhello",
      `HTTP/1.1 200 OK\r\nTransfer-Encoding:\r\n\tchunked\r\n\r\n${chunks}`,
    ];
    for (const [at, reply] of replies.entries()) {
      await using server = replying(reply);
      assert.deepEqual(await oursOf(server.url), { body: "hello", code: 0, why: "" });
      const { code, stdout } = await execute(["curl", "-s", server.url]);
      assert.deepEqual([code, stdout], [[43, ""], [8, ""], [0, chunks]][at]);
    }
  },
);

// ─── Arguments ───────────────────────────────────────────────────────────────────────────────────────────────────────

/** A list of arguments as somebody in a hurry, or with bad intent, might type it. */
function argumentsOf(random: Random): string[] {
  const junk = [
    "",
    ..."- -- -1 0 64 999999999999999999999 1e9 NaN __proto__ constructor".split(" "),
    ..."\x1b[2J \x9b31m \u202e a\nb ü \u{1f600} EF,EF,, 0x %s%n ../../etc/passwd".split(" "),
    ..."http:// http://[ http://%00/ ftp://x/".split(" "),
    "x".repeat(3000),
  ];
  const values = [...junk, ..."EF|af41|46|0xB8|184|5|0.5|A: b|A:|A;|[::1]:0x|all".split("|")];
  const options = [
    ..."-d --dscp --tos -n --count --interval -H --header -4 -6 --connect-timeout -m".split(" "),
    ..."--max-time -k --cacert --serve -i -f -s --json --mark-syn -V -h -x --no-such".split(" "),
    ..."-sif4 -s- -s-json --json=1 --dscp=".split(" "),
  ];
  return Array.from({ length: random.below(6) }, () => {
    const kind = random.below(4);
    return kind === 0
      ? random.oneOf(values)
      : kind === 1
      ? random.oneOf(options) + random.oneOf(["", "=", ""]) + random.oneOf(values)
      : random.oneOf(options);
  });
}

Deno.test("two thousand argument lists are understood, or refused in one clean line with a documented code", () => {
  const random = new Random(SEED);
  let refused = 0;
  for (let at = 0; at < 2000; at++) {
    const args = argumentsOf(random);
    try {
      const options = parseArguments(args);
      if (options.url !== null) parseTarget(options.url);
    } catch (error) {
      assert.ok(error instanceof Failure, `SEED=${SEED} ${JSON.stringify(args)}: ${error}`);
      assert.ok(error.code === Exit.usage || error.code === Exit.badUrl);
      assert.doesNotMatch(error.message, /[\p{Cc}\u202e]/u);
      assert.ok(error.message.length > 0);
      refused++;
    }
  }
  assert.ok(refused > 500 && refused < 2000, `${refused} refused`);
});

Deno.test("argument lists end real processes with a documented code and no stack trace", async () => {
  const random = new Random(SEED + 1);
  const documented = new Set<number>(Object.values(Exit));
  // With these, whatever is asked for is asked of nobody: a URL that refuses, and no time to serve.
  const lists = Array.from({ length: 120 }, () => argumentsOf(random)).filter((args) =>
    !args.some((arg) => arg.includes("serve") || arg.includes("\0"))
  );
  const run = async (args: string[]) => {
    const { code, stderr } = await dscpGet([
      "-m",
      "2",
      ...args,
      `http://127.0.0.1:${closedPort()}/`,
    ]);
    assert.ok(documented.has(code), `SEED=${SEED} ${JSON.stringify(args)}: ${code} ${stderr}`);
    assert.doesNotMatch(stderr, /^ +at |Uncaught|panicked/m);
    assert.ok(stderr.split("\n").filter((line) => line.startsWith("dscp-get: ")).length <= 1);
    assert.doesNotMatch(stderr, /(?!\n)[\p{Cc}\u202e]/u);
  };
  for (let at = 0; at < lists.length; at += 4) await Promise.all(lists.slice(at, at + 4).map(run));
});
