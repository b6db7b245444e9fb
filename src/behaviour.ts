/**
 * What a path does to marks, by the names of RFC 9435 section 4. A value does not reveal what made
 * it, so the words are "as by", never "because of".
 *
 * @module
 */

import { sameDscp } from "../ffi/dscp.ts";

/** A ToS byte as it was sent and as it arrived. */
export interface Pair {
  readonly sent: number;
  readonly arrived: number;
}

interface Behaviour {
  readonly name: string;
  /** Of RFC 9435. */
  readonly section: string;
  /** What becomes of a DSCP; a network may choose a `parameter`, one for all packets. */
  readonly apply: (dscp: number, parameter: number) => number;
  /** The greatest parameter, from 1 up; without it there is none. */
  readonly parameters?: number;
}

const isNetworkControl = (dscp: number) => dscp >> 4 === 3;

const BEHAVIOURS: readonly Behaviour[] = [
  { name: "Bleach-DSCP", section: "4.1", apply: () => 0 },
  { name: "Bleach-ToS-Precedence", section: "4.2.1", apply: (x) => x & 7 },
  { name: "Bleach-some-ToS", section: "4.2.1", apply: (x) => isNetworkControl(x) ? x : x & 7 },
  { name: "Re-mark-ToS", section: "4.2.2", apply: (x, p) => p << 3 | x & 7, parameters: 7 },
  { name: "Bleach-low", section: "4", apply: (x) => x & 0x38 },
  { name: "Bleach-some-low", section: "4", apply: (x) => isNetworkControl(x) ? x : x & 0x38 },
  { name: "Re-mark-DSCP", section: "4.3", apply: (_, y) => y, parameters: 63 },
];

const isKept = ({ sent, arrived }: Pair) => sameDscp(sent, arrived);

/** The behaviours that explain every pair of one stretch of a path; none if no mark was changed. */
export function behaviours(pairs: readonly Pair[]): Behaviour[] {
  const fits = ({ apply, parameters = 1 }: Behaviour) =>
    Array.from({ length: parameters }, (_, at) => at + 1).some((parameter) =>
      pairs.every(({ sent, arrived }) => apply(sent >> 2, parameter) === arrived >> 2)
    );
  return pairs.every(isKept) ? [] : BEHAVIOURS.filter(fits);
}

/** The same in words, as `as by Bleach-DSCP (RFC 9435, 4.1)`; `null` if no mark was changed. */
export function behaviourText(pairs: readonly Pair[]): string | null {
  if (pairs.every(isKept)) return null;
  const found = behaviours(pairs);
  if (found.length === 0) return "by no single rule of RFC 9435";
  const names = found.map(({ name }) => name).join(" or ");
  const sections = [...new Set(found.map(({ section }) => section))].join(", ");
  return `as by ${names} (RFC 9435, ${sections})`;
}

/** The two marks that distinguish all behaviours from each other and from none. */
export const TELLING_MARKS = "EF,50";

/** What a single change means to the traffic, in words; `null` if there is nothing to add. */
export function consequence(pair: Pair): string | null {
  const sent = pair.sent >> 2, arrived = pair.arrived >> 2;
  if (sent === arrived) return null;
  if (sent === 1 && arrived === 0) {
    return "LE was promoted: background traffic now competes with all other (RFC 9435, 6.1)";
  }
  if (arrived === 1 && (sent & 7) === 1) {
    return "it was demoted to LE, below best effort (RFC 9435, 6.2.1)";
  }
  if (arrived !== 0 && arrived === (sent & 0x38)) {
    return "Wi-Fi access points make such a DSCP from a frame's priority (RFC 9435, 5.1.2)";
  }
  if (isNetworkControl(sent) && (sent & 7) === 0) {
    return "usual for hosts: CS6 and CS7 are the network's own classes (RFC 4594, 3.2)";
  }
  return null;
}
