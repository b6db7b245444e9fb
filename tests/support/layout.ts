/**
 * The rules for the layout of the code, as a pure function of its files.
 *
 * @module
 */

/** The lines that a file may have, by the first rule that it matches. */
const LINES: readonly [files: RegExp, lines: number][] = [[/^main\.ts$/, 350], [
  /^(src|ffi)\//,
  450,
]];
const FUNCTION_LINES = 60, COLUMNS = 100;

/** What may stand at the top level, beside files whose names start with a dot. */
const TOP = ["LICENSE", "README.md", "deno.json", "ffi", "main.ts", "src", "tests"];

/** The layers, from the top down: a file imports from its own layer and from those below it. */
const LAYERS = ["main", "src", "ffi"];

/**
 * Returns how files break the rules, one line each.
 *
 * @param files texts by path; of tests and other files only the path counts
 */
export function violations(files: ReadonlyMap<string, string>): string[] {
  const product = [...files].filter(([path]) => /^(main\.ts$|(src|ffi)\/.*\.ts$)/.test(path));
  const imports = new Map(product.map(([path, text]) => [path, importsOf(path, text)]));
  return [
    ...[...new Set([...files.keys()].map((path) => path.split("/")[0]))]
      .filter((name) => !name.startsWith(".") && !TOP.includes(name))
      .map((name) => `${name}: not allowed at the top level`),
    ...product.flatMap(([path, text]) => [...sizes(path, text), ...owners(path, text)]),
    ...[...imports].flatMap(([path, targets]) =>
      targets.flatMap((to) => wrongImport(path, to, files))
    ),
    ...circles(imports),
  ];
}

function sizes(path: string, text: string): string[] {
  const lines = text.trimEnd().split("\n");
  const [, limit] = LINES.find(([files]) => files.test(path))!;
  return [
    ...lines.length > limit ? [`${path}: ${lines.length} lines, more than ${limit}`] : [],
    ...lines.flatMap((line, at) =>
      [...line].length > COLUMNS ? [`${path}:${at + 1}: over ${COLUMNS} columns`] : []
    ),
    ...functions(lines).filter(({ length }) => length > FUNCTION_LINES)
      .map(({ at, length }) => `${path}:${at}: a function of ${length} lines`),
  ];
}

/** The first lines and lengths of functions and methods, by the formatter's indentation. */
function functions(lines: readonly string[]): { at: number; length: number }[] {
  const indents = lines.map((line) => line === "" ? Infinity : line.search(/\S/));
  // What stands in a text of several lines has an indentation of its own.
  let isText = false;
  for (const [at, line] of lines.entries()) {
    if (isText) indents[at] = Infinity;
    if (line.split(/(?<!\\)`/).length % 2 === 0) isText = !isText;
  }
  return lines.flatMap((line, at) => {
    if (indents[at] === Infinity || !FUNCTION.test(line) || STATEMENT.test(line)) return [];
    // Parameters that take several lines end in `) {`, and the function goes on.
    const end = lines.findIndex((other, to) =>
      to > at && indents[to] <= indents[at] && !/^ *\).*[{(>]$/.test(other)
    );
    return [{ at: at + 1, length: Math.max(end - at, 0) + (/^ *}/.test(lines[end]) ? 1 : 0) }];
  });
}

const FUNCTION =
  /^ *((export |default |async )*function\b|(export )?const \w+ = .*(\($|=>)|((async|static|get|set|private) )*[*#]*\w+(<.*>)?\()/;
const STATEMENT = /^ *(if|for|while|switch|catch|return|await|throw|super)\b|;$/;

/** Calls that only one file may make. */
function owners(path: string, text: string): string[] {
  const code = text.replace(/\/\*[^]*?\*\/|^\s*\/\/.*$/gm, "");
  return [["Deno.dlopen", "ffi/libc.ts"], ["Deno.exit", "main.ts"]].flatMap(([call, owner]) =>
    path !== owner && code.includes(`${call}(`) ? [`${path}: ${call} outside ${owner}`] : []
  );
}

/** What a file imports, by types and dynamic imports too: paths in the checkout, or names. */
function importsOf(path: string, text: string): string[] {
  const code = text.replace(/\/\*[^]*?\*\/|^\s*\/\/.*$/gm, "");
  const found = code.matchAll(/(?:\bfrom|\bimport)\s*\(?\s*["']([^"'\n]+)["']/g);
  return [...found].map(([, name]) =>
    name.startsWith(".") ? new URL(name, `file:///${path}`).pathname.slice(1) : name
  );
}

function wrongImport(path: string, to: string, files: ReadonlyMap<string, string>): string[] {
  if (to.startsWith("node:")) return [];
  if (/^[\w-]+:/.test(to) || to.startsWith("@")) return [`${path}: imports ${to}`];
  if (!files.has(to)) return [`${path}: imports ${to}, which is not there`];
  const [from, target] = [path, to].map((file) => LAYERS.indexOf(file.split(/[./]/)[0]));
  const isAllowed = target >= from || to === "deno.json";
  return isAllowed ? [] : [`${path}: imports ${to}, which is above it`];
}

/** Files that import themselves by way of others. */
function circles(imports: ReadonlyMap<string, readonly string[]>): string[] {
  const reaches = (from: string, goal: string, seen = new Set<string>()): boolean =>
    (imports.get(from) ?? []).some((to) =>
      to === goal || (!seen.has(to) && (seen.add(to), reaches(to, goal, seen)))
    );
  const inCircle = [...imports.keys()].filter((path) => reaches(path, path));
  return inCircle.length === 0 ? [] : [`a circle of imports: ${inCircle.join(", ")}`];
}
