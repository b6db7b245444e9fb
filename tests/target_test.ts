import assert from "node:assert/strict";
import { Exit, Failure } from "../main.ts";
import { defaultTarget, encodeRequest, localTarget, parseTarget } from "../src/target.ts";
import { command, dscpGet, execute, testWith } from "./support/processes.ts";
import { OK, replying } from "./support/servers.ts";

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

/** What a URL becomes: scheme, host, port, Host header and path, apart by blanks. */
function shown(text: string): string {
  const { isHttps, host, port, authority, path } = parseTarget(text);
  return `${isHttps ? "https" : "http"} ${host} ${port} ${authority} ${path}`;
}

for (
  const [text, target] of [
    // Scheme and port
    ["h", "http h 80 h /"],
    ["HTTP://h", "http h 80 h /"],
    ["https://h", "https h 443 h /"],
    ["HTTPS://h:443", "https h 443 h /"],
    ["https://h:80", "https h 80 h:80 /"],
    ["http://h:443", "http h 443 h:443 /"],
    ["http://h:80/", "http h 80 h /"],
    ["http://h:1/", "http h 1 h:1 /"],
    ["http://h:65535/", "http h 65535 h:65535 /"],
    ["http://h:00080/", "http h 80 h /"],
    ["http://h:/", "http h 80 h /"],
    ["http:8086", "http http 8086 http:8086 /"],
    ["https:8086/x", "http https 8086 https:8086 /x"],
    ["h:8086", "http h 8086 h:8086 /"],
    // Host
    ["http://a.b-c_d~1./", "http a.b-c_d~1. 80 a.b-c_d~1. /"],
    ["http://[::1]:8086/x", "http ::1 8086 [::1]:8086 /x"],
    ["[::1]", "http ::1 80 [::1] /"],
    ["http://[2001:db8::1]", "http 2001:db8::1 80 [2001:db8::1] /"],
    ["http://127.0.0.1/", "http 127.0.0.1 80 127.0.0.1 /"],
    // Zone
    ["http://[fe80::1%25eth0]:81/", "http fe80::1%eth0 81 [fe80::1]:81 /"],
    ["http://[fe80::1%eth0]/x", "http fe80::1%eth0 80 [fe80::1] /x"],
    ["[fe80::1%2]", "http fe80::1%2 80 [fe80::1] /"],
    ["[fe80::1%lo]", "http fe80::1%lo 80 [fe80::1] /"],
    ["https://[fe80::1%25a.b_c~d-e]/", "https fe80::1%a.b_c~d-e 443 [fe80::1] /"],
    ["http://[fe80::1%25]/", "http fe80::1%25 80 [fe80::1] /"],
    ["http://[fe80::1%2525]/", "http fe80::1%25 80 [fe80::1] /"],
    ["http://[fe80::1%123456789012345]/", "http fe80::1%123456789012345 80 [fe80::1] /"],
    // Path and query
    ["http://h?", "http h 80 h /?"],
    ["h?x", "http h 80 h /?x"],
    ["http://h#f", "http h 80 h /"],
    ["http://h/#", "http h 80 h /"],
    ["http://h/a?b#c?d", "http h 80 h /a?b"],
    ["http://h/ü ~%41", "http h 80 h /%C3%BC%20~%41"],
    ["http://h//a//", "http h 80 h //a//"],
    ["http://h/%[fe80::1%eth0]", "http h 80 h /%[fe80::1%eth0]"],
    ["http://h/a@b:c", "http h 80 h /a@b:c"],
    // As it is written, or percent-encoded if a URI cannot have it
    ["http://EXAMPLE.Com:81/A", "http example.com 81 EXAMPLE.Com:81 /A"],
    ["http://[0:0::0001]/", "http ::1 80 [0:0::0001] /"],
    ["http://[::FFFF:192.0.2.1]/", "http ::ffff:c000:201 80 [::FFFF:192.0.2.1] /"],
    ["http://h/a/../b/./c", "http h 80 h /a/../b/./c"],
    ["http://h/a/%2e%2E/b", "http h 80 h /a/%2e%2E/b"],
    ["http://h/..", "http h 80 h /.."],
    ["http://h/\\a", "http h 80 h /%5Ca"],
    ["http://h/ a ", "http h 80 h /%20a%20"],
    ["http://h/%zz%", "http h 80 h /%zz%"],
    ["http://h/%61%C3%bc", "http h 80 h /%61%C3%bc"],
    ["http://h/?a'b|c^d`e{f}<g>\"", "http h 80 h /?a'b%7Cc%5Ed%60e%7Bf%7D%3Cg%3E%22"],
    ["http://h/-._~:/?[]@!$&'()*+,;=", "http h 80 h /-._~:/?[]@!$&'()*+,;="],
    ["http://h/\u0080\u{1f600}", "http h 80 h /%C2%80%F0%9F%98%80"],
    ["http://h/e\u0301", "http h 80 h /e%CC%81"],
    // IDNA, for names that it leaves as they are
    [
      "http://bücher.example:81/ü",
      "http xn--bcher-kva.example 81 xn--bcher-kva.example:81 /%C3%BC",
    ],
    ["http://BÜCHER.example", "http xn--bcher-kva.example 80 xn--bcher-kva.example /"],
    ["http://日本.example", "http xn--wgv71a.example 80 xn--wgv71a.example /"],
    ["http://xn--bcher-kva", "http xn--bcher-kva 80 xn--bcher-kva /"],
  ] as const
) {
  Deno.test(`the URL '${text}' is where it says`, () => assert.equal(shown(text), target));
}

const USER = "user and password in the URL are not supported";
const SEND_IT = "send them yourself: -H 'Authorization: Basic …' with the base64 of user:password";

for (
  const [text, message, hint] of [
    ["", "bad URL '': it should look like http://host:port/path"],
    ["http://", "it should look like"],
    ["http:///x", "it should look like"],
    ["http://?x", "it should look like"],
    ["http://#x", "it should look like"],
    ["HTTP:/h", "it should look like"],
    ["http:/h", "it should look like"],
    ["https:h", "it should look like"],
    ["HTTPS:h", "it should look like"],
    ["mailto:x", "it should look like"],
    ["http://:80/", "it should look like"],
    ["http://[::1", "it should look like"],
    ["http://[::g]/", "it should look like"],
    ["http://[]/", "it should look like"],
    ["http://[::1]8086/", "it should look like"],
    ["http://::1/", "it should look like"],
    ["http://a[b]/", "it should look like"],
    ["http://[fe80::1%]/", "it should look like"],
    ["http://[fe80::1%25eth/0]/", "it should look like"],
    ["http://[fe80::1%1234567890123456]/", "it should look like"],
    ["http://h:8o/", "it should look like"],
    ["http://h:-1/", "it should look like"],
    [" http://h/", "it should look like"],
    ["http://h /", "it should look like"],
    ["http://a b/", "it should look like"],
    ["http://%zz/", "it should look like"],
    ["http://xn--x/", "it should look like"],
    ["http://h:65536/", "port 65536 is not from 1 to 65535"],
    ["http://host:99999/", "port 99999 is not from 1 to 65535"],
    ["h:65536", "port 65536 is not from 1 to 65535"],
    ["http://h:0/", "port 0 is not from 1 to 65535"],
    ["https://h:00000/", "port 00000 is not from 1 to 65535"],
    ["ftp://h/", "the scheme must be http or https, not ftp"],
    ["FTP://h/", "the scheme must be http or https, not ftp"],
    ["httpx://h/", "not httpx"],
    ["a9://h/", "not a9"],
    ["a+b-c.1://h/", "not a+b-c.1"],
    ["http://a&b/", "'a&b' is no host name"],
    ["http://a'b/", "'a'b' is no host name"],
    ["http://*/", "'*' is no host name"],
    // Names that the URL parser would replace
    ["http://%65xample.com/", "'%65xample.com' is no host name", "did you mean example.com?"],
    ["http://127.1/", "'127.1' is no host name", "did you mean 127.0.0.1?"],
    ["http://010.0.0.1/", "'010.0.0.1' is no host name", "did you mean 8.0.0.1?"],
    ["http://0x7f000001/", "'0x7f000001' is no host name", "did you mean 127.0.0.1?"],
    ["http://127.0.0.1./", "'127.0.0.1.' is no host name", "did you mean 127.0.0.1?"],
    ["http://h\\x/", "'h\\x' is no host name", "did you mean h?"],
    ["http://ｈ.example/", "'ｈ.example' is no host name", "did you mean h.example?"],
    ["http://ﬁ.example/", "is no host name", "did you mean fi.example?"],
    ["http://ü\ufe0f.example/", "is no host name", "did you mean xn--tda.example?"],
    ["http://ü\u200d.example/", "it should look like"],
    ["http://a\u00adb/", "is no host name", "did you mean ab?"],
    ["http://a\u3002b/", "is no host name", "did you mean a.b?"],
    ["http://u\u0308.example/", "is no host name", "did you mean xn--tda.example?"],
    // A port alone
    ["8086", "'8086' is no host name", "did you mean http://127.0.0.1:8086/?"],
    ["1", "'1' is no host name", "did you mean http://127.0.0.1:1/?"],
    ["65535", "'65535' is no host name", "did you mean http://127.0.0.1:65535/?"],
    ["65536", "'65536' is no host name", "did you mean 0.1.0.0?"],
    ["0", "'0' is no host name", "did you mean 0.0.0.0?"],
    ["2130706433", "'2130706433' is no host name", "did you mean 127.0.0.1?"],
    // What cannot be sent
    ["http://h/\t", "control characters are not allowed"],
    ["http://h/\0", "control characters are not allowed"],
    ["http://h/\x1f", "bad URL 'http://h/\\x1f': control characters are not allowed"],
    ["http://h/\x7f", "control characters are not allowed"],
    ["http://h/\ud800", "bad URL 'http://h/\\u{d800}': it holds half a surrogate pair"],
    ["http://\udc00/", "it holds half a surrogate pair"],
    ["http://user@h/", USER, SEND_IT],
    ["http://:secret@h/", USER, SEND_IT],
    ["http://user:secret@h/", USER, SEND_IT],
    ["http://@h/", USER, SEND_IT],
    ["user:secret@h", USER, SEND_IT],
  ] as readonly (readonly [string, string, string?])[]
) {
  Deno.test(`the URL ${JSON.stringify(text)} is refused: 3`, () => {
    assert.throws(() => parseTarget(text), (error) => {
      assert.ok(error instanceof Failure);
      assert.equal(error.code, Exit.badUrl);
      assert.ok(error.message.includes(message), error.message);
      assert.equal(error.hint, hint);
      assert.doesNotMatch(error.message + error.hint, /secret/);
      return true;
    });
  });
}

Deno.test("a run without a URL asks the default port of its family's loopback address", () => {
  assert.equal(defaultTarget(null).url, "http://127.0.0.1:8086/");
  assert.equal(defaultTarget(4).url, "http://127.0.0.1:8086/");
  assert.equal(defaultTarget(6).url, "http://[::1]:8086/");
  assert.equal(localTarget("fe80::1%eth0", 5).host, "fe80::1%eth0");
});

Deno.test("a header replaces the standard one of its name in any case, and null removes it", () => {
  const lines = (...headers: [string, string | null][]) =>
    new TextDecoder().decode(encodeRequest(parseTarget("h"), headers)).split("\r\n").slice(1, -2);
  const agent = lines()[1];
  assert.match(agent, /^User-Agent: dscp-get\/\d+\.\d+\.\d+$/);
  const standard = ["Host: h", agent, "Accept: */*", "Connection: close"];
  assert.deepEqual(lines(), standard);
  assert.deepEqual(lines(["X", "1"], ["X", ""]), [...standard, "X: 1", "X: "]);
  assert.deepEqual(lines(["ACCEPT", null], ["x", null]), standard.filter((_, at) => at !== 2));
  assert.deepEqual(lines(["connection", "a"], ["Connection", "b"]), [
    ...standard.slice(0, 3),
    "connection: a",
    "Connection: b",
  ]);
  assert.deepEqual(lines(["host", "a"], ["HOST", "b"]), [...standard.slice(1), "host: a"]);
  assert.deepEqual(lines(["Host", null], ["host", "b"]), [...standard.slice(1), "host: b"]);
  assert.deepEqual(lines(["Host", null]), standard.slice(1));
});

testWith(["curl", "bash"], "what is written is what is sent, as by curl --path-as-is", async () => {
  await using server = replying(OK);
  const rest = [
    "/a/../b/./c?x=../y",
    "/..",
    "/%2e%2E/%61%zz",
    "//a//b?c??d",
    "/a'b(c)*d;e=f,g!h:i@j&k$l~m[n]",
  ];
  const headers = [
    "X-Text: ü € 日本",
    "X-Bytes: \x01\x7f",
    "X-Colon: a: b;c",
    "x-CaSe: \u00a0a\u3000b",
  ];
  const more = headers.flatMap((header) => ["-H", header]);
  const lines = (text: string) => text.split("\r\n").filter((line) => /^(GET|x-)/i.test(line));
  for (const path of rest) {
    const url = server.url.replace(/\/$/, path);
    await dscpGet(["-s", ...more, url]);
    await execute(["curl", "-s", "-g", "--path-as-is", ...more, url]);
    const [ours, curls] = server.requests.splice(0).map(lines);
    assert.deepEqual(ours, curls);
    assert.equal(ours[0], `GET ${path} HTTP/1.1`);
    assert.equal(ours.length, 5);
  }
});

testWith(["bash"], "bytes that are not UTF-8 are refused, not replaced: 2", async () => {
  await using server = replying(OK);
  const program =
    `"$@" $'${server.url}\\xff'; echo $?; "$@" -H $'A: \\xed\\xa0\\x80' ${server.url}; echo $?`;
  const { stdout, stderr } = await execute(["bash", "-c", program, "bash", ...command(["-s"])]);
  assert.equal(stdout, "2\n2\n");
  assert.match(
    stderr,
    /^dscp-get: 'http.*\ufffd' is not UTF-8, or contains U\+FFFD\nhint: .*%FF\n/,
  );
  assert.equal(server.requests.length, 0);
});
