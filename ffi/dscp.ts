/**
 * Code points: names ↔ numbers ↔ the byte in the IP header. Pure, no system calls.
 *
 * The byte is called ToS in IPv4 and Traffic Class in IPv6; its upper six bits are the DSCP, its
 * lower two are ECN (RFC 2474 section 3, RFC 3168 section 5).
 *
 * @module
 */

/** A code point, with the byte that carries it and its name. */
export interface Mark {
  /** The name in capitals, such as `EF`; `DF` for 0, `VA` for 44, `null` if there is none. */
  readonly name: string | null;
  /** The code point, 0 to 63 (RFC 2474 section 3). */
  readonly dscp: number;
  /** The ToS byte or Traffic Class, 0 to 252: `dscp << 2`, both ECN bits zero. */
  readonly tos: number;
}

// RFC 2474 (CS, DF), RFC 2597 (AF), RFC 3246 (EF), RFC 5865 (VOICE-ADMIT), RFC 8622 (LE), RFC 9956
// (NQB). Of names for one code point, `nameOf` gives the first.
const NAMES: ReadonlyMap<string, number> = new Map([
  ["DF", 0],
  ["EF", 46],
  ["VA", 44],
  ["NQB", 45],
  ["LE", 1],
  ...[0, 1, 2, 3, 4, 5, 6, 7].map((n) => [`CS${n}`, n << 3] as const),
  ...[1, 2, 3, 4].flatMap((n) =>
    [1, 2, 3].map((drop) => [`AF${n}${drop}`, n << 3 | drop << 1] as const)
  ),
  ["VOICE-ADMIT", 44],
  ["BE", 0],
]);

// Bytes that curl's --ip-tos has names for, besides those of the DSCPs: RFC 1349's, and ECN bits.
const CURL_NAMES: ReadonlyMap<string, number> = new Map([
  ["LOWDELAY", 0x10],
  ["THROUGHPUT", 0x08],
  ["RELIABILITY", 0x04],
  ["MINCOST", 0x02],
  ["LOWCOST", 0x02],
  ["ECT0", 0x02],
  ["ECT1", 0x01],
  ["CE", 0x03],
]);

const DSCP_ALLOWED = "EF, VA or VOICE-ADMIT, NQB, LE, DF or BE, CS0 to CS7, AF11 to AF13, " +
  "AF21 to AF23, AF31 to AF33, AF41 to AF43, or a number from 0 to 63";
const TOS_ALLOWED = "a number from 0 to 255, decimal or 0x hex, whose two lowest bits (ECN) are 0";

/** The name of a code point (0 to 63), or `null` if no RFC gives one. */
export function nameOf(dscp: number): string | null {
  for (const [name, value] of NAMES) if (value === dscp) return name;
  return null;
}

/** The mark whose byte is `tos`, named by {@linkcode nameOf}; ECN bits are dropped. */
export function markOf(tos: number): Mark {
  const dscp = tos >> 2;
  return { name: nameOf(dscp), dscp, tos: dscp << 2 };
}

/**
 * Reads a code point as a person writes it: a name in any case, or a number from 0 to 63, decimal
 * or 0x hex.
 *
 * ```ts
 * import { parseDscp } from "./dscp.ts";
 * console.log(parseDscp("ef")); // { name: "EF", dscp: 46, tos: 184 }
 * ```
 *
 * @throws {RangeError} the text is neither; the message lists what is allowed
 */
export function parseDscp(text: string): Mark {
  const dscp = NAMES.get(text.toUpperCase()) ??
    (/^(0x[0-9a-f]{1,2}|0|[1-9]\d?)$/i.test(text) ? Number(text) : NaN);
  if (!(dscp <= 63)) {
    throw new RangeError(`${quote(text)} is not a DSCP; allowed are ${DSCP_ALLOWED}`);
  }
  return markOf(dscp << 2);
}

/** Reads a ToS byte or Traffic Class, decimal or hex. @throws {RangeError} as `checkTos` */
export function parseTos(text: string): Mark {
  const tos = /^(0x[0-9a-f]{1,2}|0|[1-9]\d*)$/i.test(text) ? Number(text) : NaN;
  checkTos(tos, quote(text));
  return markOf(tos);
}

/**
 * Reads a value of curl's `--ip-tos`: a name, also one of RFC 1349, or the whole byte as a number.
 *
 * @throws {RangeError} the text is neither, or a name of ECN bits
 */
export function parseIpTos(text: string): Mark {
  const name = text.toUpperCase(), dscp = NAMES.get(name), tos = CURL_NAMES.get(name);
  if (dscp !== undefined) return markOf(dscp << 2);
  if (tos === undefined) return parseTos(text);
  checkTos(tos);
  return markOf(tos);
}

/**
 * Checks that a TCP socket can be given the byte `tos`, which messages call `shown`.
 *
 * @throws {RangeError} not an integer from 0 to 255, or one with ECN bits
 */
export function checkTos(tos: number, shown = `${tos}`): void {
  if (!Number.isInteger(tos) || tos < 0 || tos > 255) {
    throw new RangeError(`${shown} is not a ToS byte; allowed is ${TOS_ALLOWED}`);
  }
  const ecn = tos & 0b11;
  if (ecn !== 0) {
    const why = "ECN bits (the two lowest), which TCP owns: the kernel would drop them";
    throw new RangeError(`ToS ${hex(tos)} sets ${why}; allowed is ${hex(tos - ecn)}`);
  }
}

/** Whether two bytes carry the same DSCP; the ECN bits are TCP's own (RFC 3168 section 6.1). */
export function sameDscp(a: number, b: number): boolean {
  return a >> 2 === b >> 2;
}

/** A byte as people of the field write it: `0xB8`. */
export function hex(byte: number): string {
  return `0x${byte.toString(16).toUpperCase().padStart(2, "0")}`;
}

/** A mark in words: `EF (0xB8)`, or `DSCP 13 (0x34)` if it has no name. */
export function describe(mark: Mark): string {
  return `${mark.name ?? `DSCP ${mark.dscp}`} (${hex(mark.tos)})`;
}

function quote(text: string): string {
  return text === "" ? "an empty text" : JSON.stringify(text);
}
