import assert from "node:assert/strict";
import { Namespace } from "./support/namespaces.ts";
import { Background, dscpGet, testWith } from "./support/processes.ts";
import { Certificates } from "./support/servers.ts";

// A request can take Deno's socket or libc's, and TLS of either; what becomes of it is the same.
// Each row is a situation, and what all ways make of it.

const HTTP: Record<string, string[]> = {
  "plain": [],
  "-4": ["-4"],
  "--mark-syn": ["--mark-syn"],
  "--trace": ["--trace"],
  "a large request": ["-H", `X: ${"x".repeat(4000)}`],
};

/** The same over TLS, with a root of ours to trust. */
const https = (root: string): Record<string, string[]> => ({
  ...HTTP,
  "--cacert": ["--cacert", root],
  "-k": ["-k"],
  "-k --mark-syn": ["-k", "--mark-syn"],
});

const HOSTS = `127.0.0.1 four.example server.example
::1 six.example
127.0.0.1 both.example
::1 both.example
192.0.2.9 dead.example
127.0.0.1 dead.example
`;

/** Answers by the path: in the clear on port 8080, and with TLS on 8443. */
const SERVER = `
import socket, ssl, struct, sys, threading
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1], sys.argv[2])
HEAD = b"HTTP/1.1 200 OK\\r\\n"
REPLIES = {
    "whole": HEAD + b"Content-Length: 2\\r\\n\\r\\nok",
    "unbounded": HEAD + b"\\r\\nok",
    "short": HEAD + b"Content-Length: 10\\r\\n\\r\\nok",
    "chunk": HEAD + b"Transfer-Encoding: chunked\\r\\n\\r\\n5\\r\\nok",
    "head": HEAD,
    "nothing": b"",
}
def handle(conn, secure):
    try:
        if secure:
            conn = context.wrap_socket(conn, server_side=True)
        request = b""
        while b"\\r\\n\\r\\n" not in request:
            piece = conn.recv(65536)
            if not piece:
                return
            request += piece
            if request[0] == 0x16:
                conn.sendall(b"HTTP/1.1 400 Bad Request\\r\\n\\r\\n")
                return
        _, reply, end = request.split(b" ")[1].decode().split("/")
        conn.sendall(REPLIES[reply])
        if end == "notified" and secure:
            conn = conn.unwrap()
        if end == "reset":
            # Until the reply has arrived, a reset would discard it.
            conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if REPLIES[reply]:
                while struct.unpack_from("I", conn.getsockopt(6, 11, 32), 24)[0] > 0:
                    pass
    except OSError:
        pass
    finally:
        conn.close()
def serve(family, address, port, secure):
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(64)
    def accept():
        while True:
            threading.Thread(target=handle, args=(listener.accept()[0], secure), daemon=True).start()
    threading.Thread(target=accept).start()
for port, secure in ((8080, False), (8443, True)):
    serve(socket.AF_INET, "127.0.0.1", port, secure)
serve(socket.AF_INET, "127.0.0.2", 8443, True)
serve(socket.AF_INET6, "::1", 8086, False)
print("listening", flush=True)
`;

/** A host with that server, and without a line for localhost in its /etc/hosts. */
async function start() {
  const stack = new AsyncDisposableStack();
  const certificates = stack.use(await Certificates.create());
  const namespace = stack.use(await Namespace.create(HOSTS));
  const { under } = namespace, { certificate, key } = certificates;
  const server = [...under, "python3", "-c", SERVER, certificate, key];
  await stack.use(new Background(server)).until((said) => said.includes("listening"));
  const flags = ["--allow-net", "--allow-ffi", "--allow-read"];
  const run = (args: readonly string[], env: Record<string, string> = {}) =>
    dscpGet(["--connect-timeout", "5", "-m", "10", ...args], { under, flags, env });
  return { certificates, run, [Symbol.asyncDispose]: () => stack.disposeAsync() };
}

testWith(
  ["root", "ip", "python3", "openssl"],
  "a host is found or not, whichever way the request takes",
  async () => {
    await using host = await start();
    for (
      const [where, code, but] of [
        ["127.0.0.1:8080", 0, {}],
        ["localhost:8080", 0, {}],
        ["localhost.:8080", 0, {}],
        ["LOCALHOST:8080", 0, {}],
        ["a.localhost:8080", 0, {}],
        ["server.example:8080", 0, {}],
        ["both.example:8080", 0, {}],
        ["dead.example:8080", 0, {}],
        ["0.0.0.0:8080", 0, {}],
        ["0x7f.1:8080", 0, {}],
        ["localhost:8086", 0, { "-4": 7 }],
        ["[::1]:8086", 0, { "-4": 7 }],
        ["six.example:8086", 0, { "-4": 6 }],
        ["[::1]:8080", 7, {}],
        ["127.0.0.1:1", 7, {}],
        ["localhost:1", 7, {}],
        ["192.0.2.1:8080", 7, {}],
        ["unknown.example:8080", 6, {}],
        ["383.0.0.1:8080", 3, {}],
      ] as const
    ) {
      await Promise.all(
        Object.entries(HTTP).map(async ([way, args]) => {
          const { code: got, stderr } = await host.run([...args, `http://${where}/whole/closed`]);
          const expected = (but as Record<string, number>)[way] ?? code;
          assert.equal(got, expected, `${where}, ${way}: ${stderr}`);
        }),
      );
    }
  },
);

testWith(
  ["root", "ip", "python3", "openssl"],
  "a connection may end in any way, and its reply is judged alike, whichever way the request takes",
  async () => {
    await using host = await start();
    const { root } = host.certificates, env = { DENO_CERT: root };
    for (
      const [path, code, said] of [
        ["whole/closed", 0, null],
        ["whole/notified", 0, null],
        ["whole/reset", 0, null],
        ["unbounded/closed", 0, null],
        ["unbounded/notified", 0, null],
        ["unbounded/reset", 56, "the connection was lost: connection reset by peer"],
        ["short/closed", 18, null],
        ["short/notified", 18, null],
        ["short/reset", 56, "the connection was lost: connection reset by peer"],
        ["chunk/closed", 18, null],
        ["chunk/notified", 18, null],
        ["chunk/reset", 56, "the connection was lost: connection reset by peer"],
        ["nothing/closed", 52, null],
        ["nothing/notified", 52, null],
        ["nothing/reset", 56, "the connection was lost: connection reset by peer"],
      ] as const
    ) {
      for (const [scheme, ways] of [["http", HTTP], ["https", https(root)]] as const) {
        const port = scheme === "http" ? 8080 : 8443;
        await Promise.all(
          Object.entries(ways).map(async ([way, args]) => {
            const url = `${scheme}://server.example:${port}/${path}`;
            const { code: got, stderr } = await host.run([...args, url], env);
            assert.equal(got, code, `${url}, ${way}: ${stderr}`);
            if (said !== null) {
              assert.ok(stderr.includes(`dscp-get: ${said}\n`), `${url}, ${way}: ${stderr}`);
            }
          }),
        );
      }
    }
  },
);

testWith(
  ["root", "ip", "python3", "openssl"],
  "a certificate is good or not, in the same words, whichever way the request takes",
  async () => {
    await using host = await start();
    const { root } = host.certificates, env = { DENO_CERT: root };
    const invalid = "the server's certificate is not valid:";
    for (
      const [url, env_, code, said] of [
        ["https://localhost:8443/whole/closed", env, 0, null],
        ["https://127.0.0.1:8443/whole/closed", env, 0, null],
        ["https://server.example:8443/whole/closed", env, 0, null],
        [
          "https://server.example:8443/whole/closed",
          {},
          60,
          `${invalid} its issuer is not trusted`,
        ],
        [
          "https://four.example:8443/whole/closed",
          env,
          60,
          `${invalid} it is for another host name`,
        ],
        ["https://127.0.0.2:8443/whole/closed", env, 60, `${invalid} it is for another host name`],
        ["https://server.example:8080/whole/closed", env, 35, "TLS failed: "],
      ] as const
    ) {
      await Promise.all(
        Object.entries(https(root)).map(async ([way, args]) => {
          const isAny = args.includes("-k") && code === 60;
          const isTrusted = args.includes("--cacert") && said?.includes("issuer");
          const { code: got, stderr } = await host.run([...args, url], env_);
          assert.equal(got, isAny || isTrusted ? 0 : code, `${url}, ${way}: ${stderr}`);
          if (got !== 0) {
            assert.ok(stderr.includes(`dscp-get: ${said}`), `${url}, ${way}: ${stderr}`);
          }
        }),
      );
    }
  },
);
