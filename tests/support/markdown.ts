/**
 * The README as tests read it: its blocks, commands and tables, and samples of output compared with
 * real output.
 *
 * @module
 */

import { ROOT } from "./folder.ts";

/** The README's text. */
export const readme: string = await Deno.readTextFile(`${ROOT}README.md`);

/** Returns what the first group of an expression, which is global, matches in a text. */
export function found(expression: RegExp, text: string): string[] {
  return [...text.matchAll(expression)].map(([, group]) => group);
}

/** The fenced blocks, and what is in backticks outside of them. */
export const blocks: string[] = found(/^```\w*\n([^]*?)^```$/gm, readme);
export const inline: string[] = found(
  /`([^`\n]+)`/g,
  readme.replaceAll(/^```\w*\n[^]*?^```$/gm, ""),
);

/** The lines of shell blocks, and the commands in their comments and in the text. */
export const commands: string[] = [
  ...found(/^```sh\n([^]*?)\n```$/gm, readme).join("\n").split("\n").flatMap((line) => {
    const [command, comment = ""] = line.split(/ +# /);
    return [command, ...comment.match(/(deno|dscp-get) [^;]+/g) ?? []];
  }),
  ...inline.filter((text) => /^(.+ )?(npx|deno|dscp-get) /.test(text)),
];

/** Returns the only text that is this, or else starts so. @throws if there are none, or more */
export function only(start: string, texts: readonly string[]): string {
  const like = texts.includes(start) ? [start] : texts.filter((text) => text.startsWith(start));
  if (like.length === 1) return like[0];
  throw new Error(`${like.length} blocks or commands of the README start with '${start}'`);
}

/** The cells of the table whose head starts so. */
export function table(head: string): string[][] {
  const lines = only(`| ${head}`, readme.split("\n\n")).split("\n");
  return lines.slice(2).map((row) => row.split("|").slice(1, -1).map((cell) => cell.trim()));
}

/** Lines without numbers, the width of columns, and the length of bars, which differ by run. */
export function shape(text: string): string[] {
  return text.trim().split("\n").map((line) =>
    line.replace(/\b\d+(\.\d+)?\b/g, "N").replace(/[█▏▎▍▌▋▊▉]+/g, "█").replace(/ +/g, " ")
  );
}

/** Matches what a report says, though a line is wrapped; numbers may differ, `…` is a gap in a line. */
export function pattern(said: string): RegExp {
  const source = said.replace(/[^\w ]/g, "\\$&").replace(/\b\d+(\\\.\d+)?\b/g, "\\d+(\\.\\d+)?")
    .replace(/ ?\\… ?/g, "(.|\\n )*?").replace(/ /g, "\\s+");
  return new RegExp(`^(dscp-get: )?${source}`, "m");
}
