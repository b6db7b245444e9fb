import assert from "node:assert/strict";
import { Exit, Failure } from "../main.ts";
import { parseArguments } from "../src/options.ts";
import { encodeRequest, parseTarget } from "../src/target.ts";
import { dscpGet, execute, testWith } from "./support/processes.ts";
import { OK, replying } from "./support/servers.ts";

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
      /allowed are EF, VA or VOICE-ADMIT, LE.*CS0 to CS7, AF11.*0 to 63/,
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

Deno.test("a URL is read as curl reads it, and goes out percent-encoded without its fragment", () => {
  const target = parseTarget("localhost:8086/a b/ü?q=ä&x=<y>#fragment");
  assert.deepEqual(target, {
    url: "http://localhost:8086/a%20b/%C3%BC?q=%C3%A4&x=%3Cy%3E",
    isHttps: false,
    host: "localhost",
    port: 8086,
    authority: "localhost:8086",
    path: "/a%20b/%C3%BC?q=%C3%A4&x=%3Cy%3E",
  });
  assert.deepEqual([parseTarget("HTTP://[::1]:80/").authority, parseTarget("http://h").port], [
    "[::1]",
    80,
  ]);
  assert.throws(
    () => parseTarget("gopher://h/"),
    (error) => error instanceof Failure && error.code === Exit.badUrl,
  );
});

Deno.test("an empty query keeps its question mark", () => {
  for (const url of ["http://h/a?", "http://h/a?#f", "h/a?"]) {
    const { url: asked, path } = parseTarget(url);
    assert.deepEqual([asked, path], ["http://h/a?", "/a?"]);
  }
  for (const url of ["http://h?", "http://h/?#f", "http://h:80/?"]) {
    assert.equal(parseTarget(url).path, "/?");
  }
  const request = new TextDecoder().decode(encodeRequest(parseTarget("http://h/a?"), []));
  assert.ok(request.startsWith("GET /a? HTTP/1.1\r\n"));
});

testWith(["curl"], "of several Host headers one goes out, the same as curl's", async () => {
  await using server = replying(OK);
  for (
    const given of ["Host: a|host: b", "Host:|Host: b", "Host: a|Host:", "X: 1|HOST: a|Host: b"]
  ) {
    const args = ["-s", ...given.split("|").flatMap((header) => ["-H", header]), server.url];
    await dscpGet(args);
    await execute(["curl", ...args]);
    const [ours, curls] = server.requests.splice(0).map((text) => text.match(/^host:.*$/gmi));
    assert.equal(ours?.length, 1);
    assert.equal(ours[0].toLowerCase(), curls?.[0].toLowerCase(), given);
  }
});

Deno.test("the request has Host, User-Agent, Accept and Connection, and -H changes them as curl's does", async () => {
  const text = (url: string, headers: [string, string | null][]): string =>
    new TextDecoder().decode(encodeRequest(parseTarget(url), headers));
  const lines = text("http://[::1]:8086/x", []).split("\r\n");
  assert.deepEqual(lines.slice(0, 2), ["GET /x HTTP/1.1", "Host: [::1]:8086"]);
  assert.match(lines[2], /^User-Agent: dscp-get\/\d/);
  assert.deepEqual(lines.slice(3), ["Accept: */*", "Connection: close", "", ""]);
  assert.ok(
    text("http://h:80/", []).includes("\r\nHost: h\r\n"),
    "the scheme's own port is left out",
  );

  await using server = replying(OK);
  const headers = ["host: example.org", "Accept:", "X-Empty;", "A: 1", "A: 2"];
  await dscpGet(["-s", ...headers.flatMap((header) => ["-H", header]), server.url]);
  const sent = server.requests[0];
  assert.ok(
    /^host: example\.org\r$/m.test(sent) && !/^Host/m.test(sent) && !/^Accept/m.test(sent),
    sent,
  );
  assert.ok(sent.includes("\r\nX-Empty: \r\n") && sent.includes("\r\nA: 1\r\nA: 2\r\n"), sent);
});

Deno.test("a mistake is answered with what was probably meant", async () => {
  const hintOf = async (...args: string[]) => {
    const { code, stderr } = await dscpGet(args);
    assert.equal(code, 2, stderr);
    return /^hint: (.*)$/m.exec(stderr)![1];
  };
  assert.equal(await hintOf("-d", "184"), "did you mean the whole byte? --tos 184");
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

Deno.test("what does nothing beside --serve is a usage error", () => {
  for (const args of ["-n 2", "-d EF", "-k", "--json", "-m 3"]) {
    assert.throws(
      () => parseArguments(["--serve", "0", ...args.split(" ")]),
      (error) => error instanceof Failure && error.code === Exit.usage,
      args,
    );
  }
  assert.equal(parseArguments(["--serve", "0", "-s"]).silent, true);
});

Deno.test("options that would do nothing are usage errors", () => {
  const url = "http://192.0.2.1/";
  for (
    const words of [
      `--max-hops 5 ${url}`,
      `--interval 1 ${url}`,
      `--trace --interval 1 -d EF,DF ${url}`,
      `-i --json ${url}`,
      `-i -n 2 ${url}`,
      `--trace -i ${url}`,
    ]
  ) {
    const wrong = () => parseArguments(words.split(" "));
    assert.throws(wrong, { code: 2, message: /^--[a-z-]+ does nothing here: / }, words);
  }
  for (const words of [`--trace --max-hops 5 ${url}`, `--interval 1 -n 2 ${url}`, `-i ${url}`]) {
    parseArguments(words.split(" "));
  }
});
