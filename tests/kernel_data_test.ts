import assert from "node:assert/strict";
import { dial, fdOf } from "../ffi/mod.ts";
import { connectResult } from "../ffi/dial.ts";
import { interfaceWith, isHostAddress, parseDataSent, parseLooped } from "../ffi/sent.ts";
import { encode, familyOf, sameEnd } from "../ffi/sockaddr.ts";
import { denoError, LibcError, lossError, setOption } from "../ffi/calls.ts";
import { CannotRunError, EAGAIN, MSG_DONTWAIT, MSG_ERRQUEUE, open, recv } from "../ffi/libc.ts";
import { fromHex } from "./support/packets.ts";
import { execute } from "./support/processes.ts";
import { Random } from "./support/random.ts";
import "./support/waiting.ts";

const at = (hostname: string, port: number): Uint8Array =>
  encode({ transport: "tcp", hostname, port });

/** An IPv4 packet as RFC 791 draws it. */
function ipv4(
  tos: number,
  source: number[],
  destination: number[],
  ports: number[],
  link = ETHERNET + "0800",
): Uint8Array {
  const header = [0x45, tos, 0, 44, 0, 0, 0x40, 0, 64, 6, 0, 0, ...source, ...destination];
  return Uint8Array.from([...fromHex(link), ...header, ...ports, ...Array(20).fill(0)]);
}

// Two MAC addresses; those of the loopback device are zero.
const ETHERNET = "020000000001 020000000002", ON_LOOPBACK = "00".repeat(12);
const LOCAL = at("192.0.2.1", 0x1234), REMOTE = at("198.51.100.2", 80);
const GOOD = [0xb8, [192, 0, 2, 1], [198, 51, 100, 2], [0x12, 0x34, 0, 80]] as const;
/** The request's own packet behind these bytes. */
const behind = (front: string) => ipv4(GOOD[0], [...GOOD[1]], [...GOOD[2]], [...GOOD[3]], front);

Deno.test("a looped packet is read right behind its link header: then nothing wraps it", () => {
  for (
    const [what, link] of [
      ["tun", ""],
      ["PPP", "0021"],
      ["IPoIB", "0800 0000"],
      ["Ethernet", `${ETHERNET} 0800`],
      ["loopback", `${ON_LOOPBACK} 0800`],
      ["VLAN", `${ETHERNET} 8100 0005 0800`],
      ["QinQ", `${ETHERNET} 88a8 0005 8100 0006 0800`],
      ["PPPoE", `${ETHERNET} 8864 1100 0001 002e 0021`],
      ["PPPoE in VLAN", `${ETHERNET} 8100 0005 8864 1100 0001 002e 0021`],
      ["a switch's tag with a type", `${ETHERNET} dada 0000 4000 0000 0800`],
      ["a switch's tag without", `${ETHERNET} 4000 0000 0800`],
      ["MACsec that does not encrypt", `${ETHERNET} 88e5 0000 00000001 ${"00".repeat(8)} 0800`],
      // The destination's first byte could be the first of an IP header.
      ["an address like IPv4", `45b80000002c 020000000002 0800`],
      ["an address like IPv6", `60b80000002c 020000000002 0800`],
    ] as const
  ) {
    const { tos, length, ...rest } = parseLooped(behind(link), LOCAL, REMOTE)!;
    assert.deepEqual(
      [tos, length, rest.isWrapped, rest.outerTos, rest.linkHeader],
      [0xb8, 44, false, null, fromHex(link).length],
      what,
    );
  }
});

Deno.test("whatever else is in front of a packet wraps it, and an outer IP header's byte counts", () => {
  const addresses = "0a000001 0a000002", mac = `${ETHERNET} 0800`;
  // As long as its header says, or not; carrying what it says, or not.
  const outer4 = (protocol: string, length = "0040") =>
    `4520 ${length} 0000 4000 40${protocol} 0000 ${addresses}`;
  const outer6 = (next: string) => `62000000 002c ${next} 40 ${"20".repeat(32)}`;
  const udp = "1234 12b5 0000 0000", vxlan = `${udp} 0800 0000 0000 0100 ${mac}`;
  const label = "0001 0140", ends = "0001 0040";
  for (
    const [what, front, outerTos, linkHeader] of [
      ["IPIP", mac + outer4("04"), 0x20, 14],
      ["IPIP with options", `${mac} 4620 0044 0000 4000 4004 0000 ${addresses} 01010100`, 0x20, 14],
      ["IPIP, another length", mac + outer4("04", "9999"), 0x20, 14],
      ["GRE", `${mac} ${outer4("2f")} 0000 0800`, 0x20, 14],
      ["GRE with a key", `${mac} ${outer4("2f")} 2000 0800 0000 0001`, 0x20, 14],
      [
        "ESP without a cipher, which has a trailer",
        `${mac} ${outer4("32")} 00000001 00000001`,
        0x20,
        14,
      ],
      ["GRE in it", `${mac} ${outer4("32")} 00000001 00000001 0000 0800`, 0x20, 14],
      ["FOU, its length too small", `${mac} ${outer4("11", "0038")} ${udp}`, 0x20, 14],
      ["VXLAN", `${mac} ${outer4("11", "005e")} ${vxlan}`, 0x20, 14],
      ["VXLAN in VLAN", `${ETHERNET} 8100 0005 0800 ${outer4("11")} ${vxlan}`, 0x20, 18],
      ["VXLAN in QinQ", `${ETHERNET} 88a8 0005 8100 0006 0800 ${outer4("11")} ${vxlan}`, 0x20, 22],
      ["VXLAN over IPv6", `${ETHERNET} 86dd ${outer6("11")} ${vxlan}`, 0x20, 14],
      ["an unknown protocol", mac + outer4("fd"), 0x20, 14],
      ["IPIP in PPPoE", `${ETHERNET} 8864 1100 0001 002e 0021 ${outer4("04")}`, 0x20, 22],
      ["in IPv6 in PPPoE", `${ETHERNET} 8864 1100 0001 002e 0057 ${outer6("04")}`, 0x20, 22],
      [
        "IPIP in IPIP",
        `${mac} ${outer4("04")} 4588 0050 0000 4000 4004 0000 ${addresses}`,
        0x20,
        14,
      ],
      ["IPIP on tun", outer4("04"), 0x20, 0],
      ["in IPv6 on tun", outer6("04"), 0x20, 0],
      ["GRE on tun", `${outer4("2f")} 0000 0800`, 0x20, 0],
      // No IP header can be read: the label of MPLS has a class of its own (RFC 5462).
      ["MPLS", `${ETHERNET} 8847 ${label}`, null, 18],
      ["MPLS, two labels", `${ETHERNET} 8847 ${ends} ${label}`, null, 22],
      ["MPLS on tun", `${ends} ${label}`, null, 8],
      ["IP in an unknown type", `${ETHERNET} 88b5 ${outer4("04")}`, null, 34],
      ["GRE in an unknown type", `${ETHERNET} 88b5 ${outer4("2f")} 0000 0800`, null, 38],
      ["its address like a type", `${ETHERNET} 88b5 ${outer4("04").slice(0, -4)}0800`, null, 34],
      ["no IPv4 header", `${mac} 4420${outer4("04").slice(4)}`, null, 34],
      ["no whole IPv6 header", `${ETHERNET} 86dd ${outer6("04").slice(0, -16)}`, null, 46],
      ["no whole IPv4 header", `${mac} 4520 0040 0000 4000 4004 0000 0a000001 0a00`, null, 32],
    ] as const
  ) {
    const { tos, length, ...rest } = parseLooped(behind(front), LOCAL, REMOTE)!;
    assert.deepEqual([tos, length], [0xb8, 44], what);
    assert.deepEqual(
      [rest.isWrapped, rest.outerTos, rest.linkHeader],
      [true, outerTos, linkHeader],
      what,
    );
  }
});

Deno.test("a packet that goes to the loopback device, and not to an address of this host, was redirected", () => {
  const [source, ports] = [[192, 0, 2, 1], [0x12, 0x34, 0x3a, 0x99]];
  // The target itself, which a rule keeps here; this host; an address of it; the source.
  for (const to of [[198, 51, 100, 2], [127, 0, 0, 1], [203, 0, 113, 7], source]) {
    const isRedirected = (mac: string, isHere: boolean) =>
      parseLooped(ipv4(0xb8, source, to, ports, mac), LOCAL, REMOTE, () => isHere)!.isRedirected;
    assert.equal(isRedirected(`${ON_LOOPBACK} 0800`, false), true, String(to));
    assert.equal(isRedirected(`${ON_LOOPBACK} 0800`, true), false);
    for (let at = 0; at < 12; at++) {
      const bytes = Array(12).fill("00");
      bytes[at] = "01";
      assert.equal(isRedirected(`${bytes.join("")} 0800`, false), false);
    }
    assert.equal(isRedirected("", false), false, "tun has no MAC addresses");
  }
  let asked: Uint8Array | null = null;
  parseLooped(behind(`${ON_LOOPBACK} 0800`), LOCAL, REMOTE, (address) => (asked = address, true));
  assert.equal(asked, REMOTE, "the connection's own target is asked for");
});

Deno.test("addresses of this host are known, whatever their port, and no others", () => {
  for (
    const [hostname, isHere] of [
      ["127.0.0.1", true],
      ["127.9.9.9", true],
      ["::ffff:127.0.0.1", true],
      ["::1", true],
      ["::", false],
      ["::7f00:1", false],
      ["128.0.0.1", false],
      ["192.0.2.1", false],
      ["0.0.0.0", false],
      ["7f00::1", false],
      ["2001:db8::1", false],
    ] as const
  ) assert.equal(isHostAddress(at(hostname, 1)), isHere, hostname);
  assert.equal(interfaceWith(at("127.0.0.1", 80)), "lo");
  assert.equal(interfaceWith(at("::1", 80)), "lo");
  assert.equal(interfaceWith(at("192.0.2.1", 80)), null);
});

Deno.test("a MAC address that looks like an IP header is none", () => {
  const vxlan = "45b8 005e 0000 4000 4011 0000 0a000001 0a000002" + "00".repeat(16 + 14);
  // Its second byte is an IPv4 header's first, and its fifth the length of the rest.
  for (const [length, front, outerTos] of [["39", "", null], ["6b", vxlan, 0xb8]] as const) {
    const ethernet = fromHex(`02 42 0a 00 ${length} 05 02 00 00 00 00 02 0800 ${front}`);
    const inner = behind("");
    const packet = Uint8Array.from([...ethernet, ...inner]);
    assert.equal(packet.length - 1, parseInt(length, 16));
    assert.equal(parseLooped(packet, LOCAL, REMOTE)!.outerTos, outerTos);
  }
});

Deno.test("a packet says how many bytes of data it carries, and from where in the connection", () => {
  const whole = fromHex(
    "00".repeat(14) + "45b8 0048 0000 4000 4006 0000 c0000201 c6336402" +
      "1234 0050 fedcba98 00000000 8018 0000 0000 0000" + "00".repeat(12),
  );
  const { length, payload, sequence } = parseLooped(whole, LOCAL, REMOTE)!;
  assert.deepEqual([length, payload, sequence], [72, 20, 0xfedcba98]);
  const cut = parseLooped(whole.subarray(0, 14 + 20 + 13), LOCAL, REMOTE)!;
  assert.deepEqual([cut.length, cut.payload, cut.sequence], [72, 20, 0xfedcba98]);
});

Deno.test("an IPv6 packet over 64 KiB, which leaves its length to the network card, has none", () => {
  const packet = fromHex(
    "00".repeat(14) + "6b800000 0000 06 40" + "00".repeat(15) + "01" + "00".repeat(15) + "01" +
      "1234 0050 fedcba98 00000000 5018 0000 0000 0000",
  );
  const { length, payload } = parseLooped(packet, at("::1", 0x1234), at("::1", 80))!;
  assert.deepEqual([length, payload], [0, 0]);
});

Deno.test("a packet of another connection, or cut before its data begins, is not observed", () => {
  assert.equal(
    parseLooped(ipv4(0xb8, [192, 0, 2, 9], [198, 51, 100, 9], [0x12, 0x34, 0, 80]), LOCAL, REMOTE),
    null,
  );
  assert.equal(
    parseLooped(ipv4(0xb8, [...GOOD[1]], [...GOOD[2]], [9, 9, 9, 9]), LOCAL, REMOTE),
    null,
  );
  const whole = behind(ETHERNET + "0800");
  // Byte 12 of the TCP header says where data begins, and with it how much there is.
  for (let size = 0; size <= 14 + 20 + 12; size++) {
    assert.equal(parseLooped(whole.subarray(0, size), LOCAL, REMOTE), null, `${size}`);
  }
});

Deno.test("an IPv6 packet's Traffic Class is read across its two bytes", () => {
  const packet = fromHex(
    "00".repeat(14) + "6b8fffff 0014 06 40" + "00".repeat(15) + "01" + "00".repeat(15) + "01" +
      "1234 0050" + "00".repeat(16),
  );
  const { tos, length } = parseLooped(packet, at("::1", 0x1234), at("::1", 80))!;
  assert.deepEqual([tos, length], [0xb8, 60]);
});

for (
  const [version, packet, local, remote, header] of [
    ["IPv4", ipv4(GOOD[0], [...GOOD[1]], [...GOOD[2]], [...GOOD[3]]), LOCAL, REMOTE, {
      kind: [0, 9],
      source: [12, 13, 14, 15, 20, 21],
      destination: [16, 17, 18, 19, 22, 23],
      others: [4, 5, 6, 7, 8, 10, 11, 24, 43],
    }],
    [
      "IPv6",
      fromHex(
        "00".repeat(14) + "6b80 0000 0014 06 40" + "20".repeat(16) + "30".repeat(16) +
          "1234 0050" + "00".repeat(16),
      ),
      at("2020:2020:2020:2020:2020:2020:2020:2020", 0x1234),
      at("3030:3030:3030:3030:3030:3030:3030:3030", 80),
      {
        kind: [6],
        source: [8, 15, 23, 40, 41],
        destination: [24, 31, 39, 42, 43],
        others: [2, 3, 7, 44, 59],
      },
    ],
  ] as const
) {
  Deno.test(`a byte of an ${version} packet that is not ours makes it none of ours, or no other mark`, () => {
    const random = new Random(1);
    /** The mark that is read if another value stands in each of these bytes of the IP packet. */
    const changed = (...where: number[]) => {
      const bytes = packet.slice();
      for (const offset of where) bytes[14 + offset] ^= 1 + random.below(255);
      return parseLooped(bytes, local, remote)?.tos;
    };
    const { kind, source, destination, others } = header;
    for (let round = 0; round < 50; round++) {
      for (const offset of kind) assert.equal(changed(offset), undefined, `${offset}`);
      for (const offset of [...source, ...destination, ...others]) {
        // One end is enough: NAT on this host may have changed the other.
        assert.equal(changed(offset), 0xb8, `${offset}`);
      }
      for (const one of source) {
        for (const other of destination) {
          assert.equal(changed(one, other), undefined, `${one}, ${other}`);
        }
      }
    }
  });
}

Deno.test("addresses are compared as the kernel does, however they are written", () => {
  const same = (a: string, b: string, portA = 80, portB = 80) =>
    sameEnd(at(a, portA), at(b, portB));
  for (
    const [a, b, isSame] of [
      ["127.0.0.1", "127.0.0.1", true],
      ["127.0.0.1", "::ffff:127.0.0.1", true],
      ["::ffff:7f00:1", "::ffff:127.0.0.1", true],
      ["2001:DB8:0:0:0:0:0:1", "2001:db8::1", true],
      ["fe80::1%eth0", "fe80::1", true],
      ["127.0.0.1", "127.0.0.2", false],
      ["::1", "::2", false],
      ["::1", "0.0.0.1", false],
      ["::fffe:127.0.0.1", "127.0.0.1", false],
      ["1.2.3.4", "102:304::", false],
    ] as const
  ) assert.deepEqual([same(a, b), same(b, a)], [isSame, isSame], `${a}, ${b}`);
  assert.ok(!same("127.0.0.1", "127.0.0.1", 80, 81));
  assert.ok(!same("127.0.0.1", "127.0.0.1", 80, 80 + 256));
  assert.ok(
    !sameEnd(new Uint8Array(28), at("0.0.0.0", 0)),
    "a family that is not IP",
  );
  // However many there have been.
  for (let n = 0; n < 300; n++) {
    assert.ok(same(`10.0.${n >> 8}.${n & 255}`, `10.0.${n >> 8}.${n & 255}`));
  }
  assert.deepEqual(
    at("1:2:3:4:5:6:7:8", 258).slice(2, 24),
    fromHex("0102 00000000 0001 0002 0003 0004 0005 0006 0007 0008"),
  );
  assert.throws(() => at("not an address", 80), TypeError);
  assert.throws(() => at("1.2.3.4.5", 80), TypeError);
});

Deno.test("what is not an address is not taken for one: it would be another to the kernel", () => {
  const isV4 = ["0.0.0.0", "1.2.3.4", "255.255.255.255", "10.20.30.249"];
  for (const text of isV4) assert.equal(familyOf(text), 4, text);
  const names = "383.0.0.1 256.1.1.1 1.1.1.256 1.1.1.999 010.0.0.1 1.2.3.00 1.2.3 1.2.3.4.5 " +
    "1.2.3.4. 1..2.3 1.2.3.-4 1.2.3.+4 1.2.3.4e0 1.2.3.0x4 1.2.3.4%lo localhost 1 %";
  for (const text of names.split(" ")) {
    assert.equal(familyOf(text), null, text);
    assert.throws(() => at(text, 80), TypeError, text);
  }
  for (const text of ["", " 1.2.3.4", "1.2.3.4 ", "1.2.3.4\n"]) {
    assert.equal(familyOf(text), null, text);
  }
  const bad6 =
    "1::2::3 ::ffff:300.1.1.1 1:2:3:4:5:6:7:8:9 : a:b [::1] ::1] ::1/80 12345:: ::g ::1:80:";
  for (const text of bad6.split(" ")) assert.throws(() => at(text, 80), TypeError, text);
  for (const port of [-1, 65536, NaN]) assert.throws(() => at("::1", port), RangeError);
});

Deno.test("a libc call that fails names itself and its errno; one on a descriptor that is not open tells so", () => {
  assert.throws(() => setOption(-1, { level: 0, option: 1, name: "IP_TOS" }, 0), (error) => {
    assert.ok(error instanceof LibcError);
    assert.deepEqual([error.call, error.errno], ["setsockopt(IP_TOS)", 9]);
    assert.match(error.message, /Bad file descriptor \(errno 9\)/);
    return true;
  });
  assert.equal(recv(-1, new Uint8Array(8), MSG_ERRQUEUE), -9);
});

Deno.test("a libc that cannot be opened is a typed error", () => {
  assert.throws(() => open("libc-that-is-not-there.so.6", {}), CannotRunError);
});

Deno.test("the error number is the failed call's own, however many calls came before", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const conn = await dial({ hostname: "127.0.0.1", port: listener.addr.port, tos: 0xb8 });
  const fd = fdOf(conn);
  for (let at = 0; at < 1000; at++) {
    assert.equal(recv(fd, new Uint8Array(1), MSG_DONTWAIT), -EAGAIN, `call ${at}`);
  }
  conn.close();
});

Deno.test("bytes sent are those that wait and those that left, without what was sent again", () => {
  const info = (notSent: number, sent: bigint, sentAgain: bigint) => {
    const bytes = new Uint8Array(216), view = new DataView(bytes.buffer);
    view.setUint32(144, notSent, true);
    view.setBigUint64(200, sent, true);
    view.setBigUint64(208, sentAgain, true);
    return bytes;
  };
  for (
    const [notSent, sent, sentAgain, expected] of [
      [0, 0n, 0n, 0],
      [0, 100n, 0n, 100],
      [7, 100n, 0n, 107],
      [7, 100n, 30n, 77],
      [0xffffffff, 5_000_000_000n, 0n, 9_294_967_295],
    ] as const
  ) assert.equal(parseDataSent(info(notSent, sent, sentAgain)), expected);
  // Before Linux 4.19 the structure ends earlier, and nothing is known.
  assert.equal(parseDataSent(info(7, 100n, 30n).subarray(0, 215)), null);
});

Deno.test("an error number becomes the error that Deno throws for it", () => {
  const { BrokenPipe, ConnectionRefused, ConnectionReset, TimedOut } = Deno.errors;
  for (
    const [errno, type, loss] of [
      [2, Error, 104],
      [11, Error, 104],
      [32, BrokenPipe, 32],
      [101, Error, 101],
      [104, ConnectionReset, 104],
      [110, TimedOut, 110],
      [111, ConnectionRefused, 104],
      [113, Error, 113],
    ] as const
  ) {
    const error = denoError(errno), lost = lossError(errno);
    assert.equal(error.constructor, type, String(errno));
    assert.match(error.message, new RegExp(`^[A-Z].* \\(os error ${errno}\\)$`));
    // A connection cannot be lost by just any error number: then it is a reset.
    const LossType = type === Error || loss !== errno ? ConnectionReset : type;
    assert.equal(lost.constructor, LossType, String(errno));
    assert.match(lost.message, new RegExp(`\\(os error ${loss}\\)$`));
  }
});

Deno.test("a connect has failed at once only if the socket is closed and has no error to report", () => {
  const POLLOUT = 0x4, POLLERR = 0x8, POLLHUP = 0x10, EINPROGRESS = 115;
  for (
    const [result, polled, expected] of [
      [-EINPROGRESS, 0, -EINPROGRESS],
      // A wrong errno on a socket that is connecting, connected, or was refused meanwhile
      [-2, 0, -EINPROGRESS],
      [-2, POLLOUT, -EINPROGRESS],
      [-2, POLLOUT | POLLERR | POLLHUP, -EINPROGRESS],
      [0, POLLOUT, -EINPROGRESS],
      [-101, POLLOUT | POLLHUP, -101],
      [-101, POLLHUP, -101],
    ]
  ) assert.equal(connectResult(result, polled), expected, `${result}, ${polled}`);
});

Deno.test("libc's functions are opened as addresses, and compiled once a process calls them often", async () => {
  const script = `const opened = [], { dlopen } = Deno;
    Deno.dlopen = (name, symbols) => {
      opened.push(Object.values(symbols).every(({ type }) => type === "pointer"));
      return dlopen(name, symbols);
    };
    const { recv } = await import("${new URL("../ffi/libc.ts", import.meta.url)}");
    // V8 may spoil errno once in a process, see libc.ts.
    let wrong = 0;
    const call = (times) => {
      for (let n = 0; n < times; n++) {
        if (recv(-1, new Uint8Array(1), 0) !== -9 && ++wrong > 1) throw n;
      }
      return [...opened];
    };
    console.log(JSON.stringify([call(1), call(97), call(10), call(1000)]));`;
  const words = [Deno.execPath(), "eval", script];
  const { stdout, stderr } = await execute(words);
  assert.notEqual(stdout, "", stderr);
  assert.deepEqual(JSON.parse(stdout), [[true], [true], [true, false], [true, false]]);
});
