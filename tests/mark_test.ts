import assert from "node:assert/strict";
import { Exit } from "../main.ts";
import { inject, testWith } from "./support/processes.ts";
import { OK, replying } from "./support/servers.ts";

testWith(
  ["strace"],
  "a mark that the kernel does not take is 100 and names the call and errno",
  async () => {
    await using server = replying(OK);
    const { code, stderr } = await inject(
      "setsockopt",
      "IP_TOS",
      (n) => `error=EPERM:when=${n}+`,
      [server.url],
    );
    assert.equal(code, Exit.notMarked, stderr);
    assert.match(
      stderr,
      /^dscp-get: the kernel did not accept the mark: setsockopt\(IP_TOS\): Operation not permitted \(errno 1\)$/m,
    );
  },
);

testWith(["strace"], "a mark that reads back as another is 100 and names both", async () => {
  await using server = replying(OK);
  const { code, stderr } = await inject(
    "getsockopt",
    "IP_TOS",
    (n) => `poke_exit=@arg4=20000000:when=${n}`,
    [server.url],
  );
  assert.equal(code, Exit.notMarked, stderr);
  assert.match(
    stderr,
    /setsockopt\(IP_TOS, 0xB8\) was accepted, but getsockopt\(IP_TOS\) reads back 0x20 \(errno 0\)$/m,
  );
});
