import assert from "node:assert/strict";
import { CannotRunError, DescriptorError, LibcError, MarkError } from "../ffi/mod.ts";
import {
  Exit,
  Failure,
  failureOf,
  isAddress,
  isPeerGone,
  missingPermission,
  type Stage,
} from "../src/failure.ts";
import { errorText } from "../src/text.ts";
import { execute, MAIN } from "./support/processes.ts";
import { closedPort } from "./support/servers.ts";

const { ConnectionRefused, ConnectionReset, NotCapable, TimedOut } = Deno.errors;

/** What a failure consists of, for comparing. */
function parts({ code, message, hint }: Failure): [number, string, string | undefined] {
  return [code, message, hint];
}

Deno.test("exit codes are curl's below 100, and our own above", () => {
  const codes = [0, 2, 3, 6, 7, 8, 18, 22, 23, 28, 35, 52, 56, 60, 77, 100, 101, 102, 103, 104];
  assert.deepEqual(Object.values(Exit), codes);
});

Deno.test("each error at each stage of a request has its code, message and hint", () => {
  const to = { hostname: "192.0.2.1", port: 80 };
  const refused = new ConnectionRefused("Connection refused (os error 111)");
  const libc = new LibcError("setsockopt(IP_TOS)", 1);
  const mark = new MarkError("IP_TOS", 0xb8, 0);
  const refusedMark = (error: Error) => `the kernel did not accept the mark: ${error.message}`;
  const rows: [unknown, Stage | null, number, string, string?][] = [
    ["thrown \x1b", null, 103, "thrown \\x1b"],
    ["thrown", "connecting", 103, "thrown"],
    [new Error("Oops \x1b"), null, 103, "Oops \\x1b"],
    [new CannotRunError("not on Linux"), "connecting", 103, "not on Linux"],
    [new CannotRunError("not on Linux"), null, 103, "not on Linux"],
    [libc, "connecting", 100, refusedMark(libc)],
    [mark, "connecting", 100, refusedMark(mark)],
    [new DescriptorError("no socket"), "connecting", 100, refusedMark(new Error("no socket"))],
    [new DescriptorError("reset", true), "connecting", 56, "reset"],
    [libc, "connected", 56, `the connection was lost: ${libc.message}`],
    [libc, null, 103, libc.message],
    [refused, "listening", 7, "cannot listen on 192.0.2.1:80: connection refused"],
    [refused, "connecting", 7, "cannot connect to 192.0.2.1:80: connection refused"],
    [new TimedOut("Timed out (os error 110)"), "connecting", 28, "no answer from 192.0.2.1:80"],
    [new ConnectionReset("Reset"), "securing", 35, "TLS failed: reset"],
    [
      new ConnectionReset("Connection reset by peer (os error 104)"),
      "connected",
      56,
      "the connection was lost: connection reset by peer",
    ],
    [new TimedOut("Late"), "connected", 56, "the connection was lost: late"],
    [
      new NotCapable('Requires read access to "x", run again with the --allow-read flag'),
      "connecting",
      103,
      'requires read access to "x"',
      "run with --allow-net --allow-ffi",
    ],
    [
      new NotCapable('Requires net access to "a.test", run again with the --allow-net flag'),
      "connecting",
      103,
      'requires net access to "a.test"',
      "run with --allow-net=a.test",
    ],
  ];
  for (const [error, stage, code, message, hint] of rows) {
    const failure = failureOf(error, stage, stage === null ? undefined : to);
    assert.deepEqual(parts(failure), [code, message, hint], `${error} ${stage}`);
  }
  const known = new Failure(1, "known", "hint");
  assert.equal(failureOf(known, "connecting", to), known);
});

Deno.test("a host that is not found is 6; an address without the family, or a zone, is 7", () => {
  const lookup = "failed to lookup address information: Name or service not known";
  const rows = [
    ["a.test", null, lookup, 6, "host 'a.test' not found"],
    ["a.test", 6, lookup, 6, "host 'a.test' has no IPv6 address"],
    ["a.test", 4, lookup, 6, "host 'a.test' has no IPv4 address"],
    ["127.0.0.1", 6, lookup, 7, "host '127.0.0.1' has no IPv6 address"],
    ["::1", 4, lookup, 7, "host '::1' has no IPv4 address"],
    ["fe80::1%no", null, lookup, 7, `cannot connect to [fe80::1%no]:80: ${lookup}`],
    ["a.test", null, "Other", 7, "cannot connect to a.test:80: other"],
  ] as const;
  for (const [hostname, family, text, code, message] of rows) {
    const failure = failureOf(new Error(text), "connecting", { hostname, port: 80, family });
    assert.deepEqual(parts(failure), [code, message, undefined]);
  }
  const odd = failureOf(new URIError("x"), "connecting", { hostname: "fe80::1%", port: 80 });
  assert.deepEqual(parts(odd), [7, "host 'fe80::1%' not found", undefined]);
});

Deno.test("what is an address is not looked up", () => {
  for (const host of ["127.0.0.1", "::1", "fe80::1%eth0", "1"]) assert.ok(isAddress(host), host);
  for (const host of ["a", "localhost", "1.a", "a1"]) assert.ok(!isAddress(host), host);
});

Deno.test("a refused connection on this host has a hint how to start a server, http only", () => {
  const four = "to start a server there: this script with --serve 80, or python3 -m http.server 80";
  const six = "to start a server there: this script with --serve '[::1]:80', " +
    "or python3 -m http.server -b ::1 80";
  const rows = [
    [{ hostname: "127.0.0.1" }, four],
    [{ hostname: "127.9.9.9" }, four],
    [{ hostname: "localhost" }, four],
    [{ hostname: "localhost." }, four],
    [{ hostname: "a.localhost" }, four],
    [{ hostname: "localhost", family: 4 }, four],
    [{ hostname: "localhost", family: 6 }, six],
    [{ hostname: "::1" }, six],
    [{ hostname: "::11" }, undefined],
    [{ hostname: "localhost", isHttps: true }, undefined],
    [{ hostname: "notlocalhost" }, undefined],
    [{ hostname: "localhost.test" }, undefined],
    [{ hostname: "1.127.0.0" }, undefined],
  ] as const;
  for (const [to, hint] of rows) {
    const error = new ConnectionRefused("Connection refused (os error 111)");
    const where = { port: 80, ...to };
    assert.equal(failureOf(error, "connecting", where).hint, hint, JSON.stringify(to));
    assert.equal(failureOf(new Error("Other"), "connecting", where).hint, undefined);
  }
});

Deno.test("what both TLS libraries say of a certificate becomes words, 60", () => {
  const trust = "--cacert FILE trusts the certificates in FILE, -k any";
  const accept = "-k accepts any certificate";
  const rows = [
    ["CaUsedAsEndEntity", "it is a CA certificate, not a server's (self-signed)", trust],
    ["self-signed certificate", "it is self-signed", trust],
    ["UnknownIssuer", "its issuer is not trusted", trust],
    ["self-signed certificate in certificate chain", "its issuer is not trusted", trust],
    [
      "unable to verify the first certificate",
      "its issuer is not trusted, or it is not valid today",
      trust,
    ],
    ["NotValidForName", "it is for another host name", accept],
    ['certificate not valid for name "a"', "it is for another host name", accept],
    ["Hostname/IP does not match certificate's altnames", "it is for another host name", accept],
    [
      "certificate expired: verification time 1800000000 (UNIX), but certificate is not valid " +
      "after 1700000000 (1 s ago)",
      "it was valid until 2023-11-14",
      accept,
    ],
    [
      "certificate not valid yet: verification time 1700000000 (UNIX), but certificate is not " +
      "valid before 1800000000 (1 s ahead)",
      "it will be valid from 2027-01-15",
      accept,
    ],
    ["Expired", "it has expired", accept],
    ["NotValidYet", "it is not valid yet", accept],
    ["BadSignature", "BadSignature", accept],
  ];
  for (const [said, words, hint] of rows) {
    const failure = failureOf(new Error(`invalid peer certificate: ${said}`), "securing");
    const message = `the server's certificate is not valid: ${words}`;
    assert.deepEqual(parts(failure), [Exit.badCertificate, message, hint]);
  }
});

Deno.test("a server that does not speak TLS is 35, with a hint; other faults of TLS have none", () => {
  const hint = "the server does not speak TLS: is it http://?";
  const rows = [
    ["received corrupt message of type InvalidContentType", "it is not TLS", hint],
    ["wrong version number", null, hint],
    ["packet length too long", null, hint],
    ["received fatal alert: HandshakeFailure", "there is no cipher in common with the server"],
    ["received fatal alert: ProtocolVersion", "the server's version of TLS is not supported"],
    ["received fatal alert: CertificateRequired", "the server asks for a client's certificate"],
    ["received fatal alert: UnrecognisedName", "the server does not know this host name"],
    ["unexpected end of file", "the server closed the connection"],
    ["an unexpected end", null],
    ["Client network socket disconnected before", "the server closed the connection"],
    ["received fatal alert: InternalError", null],
  ] as const;
  for (const [said, words, hint] of rows) {
    const failure = failureOf(new Error(said), "securing");
    const text = words === null ? said : `${words} (${said})`;
    const [code, message, hinted] = parts(failure);
    assert.deepEqual([code, hinted], [Exit.tlsFailed, hint]);
    assert.equal(String(message).toLowerCase(), `TLS failed: ${text}`.toLowerCase());
  }
});

const WHERE = { hostname: "127.0.0.1", port: 80 };

for (
  const [name, net, ffi, expected] of [
    ["all", true, true, null],
    ["this place", ["127.0.0.1:80"], true, null],
    ["another port", ["127.0.0.1:81"], true, "net"],
    ["no network", false, true, "net"],
    ["no ffi", true, false, "ffi"],
    ["nothing", false, false, "net"],
  ] as const
) {
  const permissions = { net: typeof net === "boolean" ? net : [...net], ffi };
  Deno.test({
    name: `the missing permission is named, with its flag: ${name}`,
    permissions,
    fn() {
      const missing = missingPermission(WHERE),
        denied = failureOf(new NotCapable("x"), null, WHERE);
      const failures: Record<string, [number, string, string]> = {
        net: [
          Exit.cannotRun,
          "no permission to use 127.0.0.1:80",
          "run with --allow-net or --allow-net=127.0.0.1:80",
        ],
        ffi: [
          Exit.cannotRun,
          "no permission to call libc, which sets the mark",
          "run with --allow-ffi",
        ],
      };
      const failure = expected === null ? null : failures[expected];
      assert.deepEqual(missing && parts(missing), failure);
      assert.deepEqual(
        parts(denied),
        failure ?? [Exit.cannotRun, "x", "run with --allow-net --allow-ffi"],
      );
      assert.deepEqual(missingPermission()?.hint, ffi ? undefined : "run with --allow-ffi");
      const { hint } = failureOf(new CannotRunError("libc cannot be opened"));
      assert.equal(hint, ffi ? undefined : "run with --allow-ffi, not --allow-ffi=FILE");
    },
  });
}

Deno.test("error texts lose what Deno adds, and are safe to print", () => {
  const rows = [
    ["Connection refused (os error 111)", "connection refused"],
    ["No such file (os error 2): open '/x'", "no such file"],
    ["Oops: https://docs.deno.com/x", "oops"],
    ["failed: ", "failed"],
    ["TLS is off", "TLS is off"],
    ["A \x1b[2J", "a \\x1b[2J"],
    ["See https://a/ for more", "see https://a/ for more"],
  ];
  for (const [text, expected] of rows) assert.equal(errorText(new Error(text)), expected);
});

Deno.test("a failure that nobody catches is printed with its hint, and where it was thrown", async () => {
  const program = `import { get } from ${JSON.stringify(MAIN)};
    await get("http://127.0.0.1:${closedPort()}/");`;
  const { code, stderr } = await execute([Deno.execPath(), "eval", program], { NO_COLOR: "1" });
  assert.equal(code, 1);
  const hint = /cannot connect to .*: connection refused\nhint: to start a server there: .*\n +at /;
  assert.match(stderr, hint);
  const plain = new Failure(1, "message"), hinted = new Failure(1, "message", "do this");
  assert.deepEqual([plain.message, hinted.message], ["message", "message"]);
  assert.doesNotMatch(plain.stack!, /hint/);
  assert.match(hinted.stack!, /^Failure: message\nhint: do this\n +at .*failure_test\.ts/);
});

Deno.test("a port below 1024 that is denied has a hint", () => {
  const hint = "ports below 1024 need root or CAP_NET_BIND_SERVICE: take 8086, or another above";
  const denied = new Deno.errors.PermissionDenied("Permission denied (os error 13)");
  const rows = [[denied, 1023, hint], [denied, 1024, undefined], [new Error("x"), 80, undefined]];
  for (const [error, port, hint] of rows as [Error, number, string?][]) {
    const failure = failureOf(error, "listening", { hostname: "127.0.0.1", port });
    assert.deepEqual([failure.code, failure.hint], [Exit.cannotConnect, hint]);
  }
});

Deno.test("errors of a peer that has gone are told from others", () => {
  const { BrokenPipe, ConnectionAborted } = Deno.errors;
  for (const type of [BrokenPipe, ConnectionReset, ConnectionAborted]) {
    assert.ok(isPeerGone(new type("x")), type.name);
  }
  for (const error of [new TimedOut("x"), new Error("x"), null]) assert.ok(!isPeerGone(error));
});
