import assert from "node:assert/strict";
import { Exit } from "../main.ts";
import { silent } from "./support/namespaces.ts";
import { dscpGet, testWith } from "./support/processes.ts";
import { OK, RawServer, readRequest, replying, send } from "./support/servers.ts";

Deno.test("-m bounds the whole request: 28, and what left before is told", async () => {
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    await conn.read(new Uint8Array(1));
  });
  const { code, stdout, stderr } = await dscpGet(["-m", "0.3", "--json", server.url]);
  assert.equal(code, Exit.timeout);
  assert.equal(stderr, "dscp-get: the request took longer than 0.3 seconds\n");
  const result = JSON.parse(stdout);
  assert.deepEqual([result.error.code, result.left.proved, result.reply], [28, true, null]);
});

testWith(["root", "ip", "nft"], "--connect-timeout bounds the connecting: 28", async () => {
  await using namespace = await silent(8099);
  for (
    const args of [["--connect-timeout", "0.3"], ["-m", "0.3"], ["-4", "--connect-timeout", ".3"]]
  ) {
    const { code, stderr } = await dscpGet([...args, "http://127.0.0.1:8099/"], namespace);
    assert.equal(code, Exit.timeout, stderr);
    assert.match(stderr, /^dscp-get: (connecting|the request) took longer than 0\.3 seconds\n$/);
  }
});

Deno.test("0 is no limit to the time", async () => {
  await using server = replying(OK);
  assert.equal(
    (await dscpGet(["-s", "-m", "0", "--connect-timeout", "0", server.url])).stdout,
    "ok",
  );
});

testWith(
  ["root", "ip", "nft", "sysctl"],
  "a connect that the kernel gives up is 28 as well",
  async () => {
    await using namespace = await silent(8099);
    await namespace.run("sysctl", "-q", "-w", "net.ipv4.tcp_syn_retries=1");
    const run = (...how: string[]) =>
      dscpGet([...how, "--connect-timeout", "0", "http://127.0.0.1:8099/"], namespace);
    for (const { code, stderr } of await Promise.all([run(), run("--mark-syn")])) {
      assert.deepEqual([code, stderr], [28, "dscp-get: no answer from 127.0.0.1:8099\n"]);
    }
  },
);

Deno.test("a server that drips is read to its end within the time, and given up after it", async () => {
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    for (const byte of OK) {
      await send(conn, byte);
      await new Promise((resolve) => setImmediate(resolve));
    }
  });
  assert.equal((await dscpGet([server.url])).stdout, "ok");
});
