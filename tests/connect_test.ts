import assert from "node:assert/strict";
import { Exit } from "../main.ts";
import { dscpGet } from "./support/processes.ts";
import { closedPort, OK, replying } from "./support/servers.ts";

Deno.test("with a URL there is no built-in server: refused is 7, with the hint how to start one", async () => {
  for (const host of ["127.0.0.1", "[::1]", "localhost"]) {
    const port = closedPort();
    const { code, stderr } = await dscpGet([`http://${host}:${port}/`]);
    assert.equal(code, Exit.cannotConnect);
    assert.match(
      stderr,
      new RegExp(
        `^dscp-get: cannot connect to .*:${port}: connection refused\nhint: .*http\\.server ${port}\n$`,
      ),
    );
  }
});

Deno.test("a host that does not exist is 6, also when a family is asked for", async () => {
  for (const args of [[], ["-4"], ["-6"]]) {
    const { code, stderr } = await dscpGet([...args, "http://does-not-exist.invalid/"]);
    assert.equal(code, Exit.hostNotFound, stderr);
    assert.match(stderr, /'does-not-exist\.invalid'/);
  }
  assert.equal((await dscpGet(["-6", "http://127.0.0.1/"])).code, Exit.hostNotFound);
  assert.equal((await dscpGet(["-4", "http://[::1]/"])).code, Exit.hostNotFound);
});

Deno.test("-4 resolves names by the system's own resolver", async () => {
  await using server = replying(OK);
  const { code, stdout } = await dscpGet(["-4", "--json", `http://localhost:${server.port}/`]);
  assert.equal(code, 0);
  assert.equal(JSON.parse(stdout).remote.address, "127.0.0.1");
});
