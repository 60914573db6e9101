// A file of items -> the parts in which a job is sent: whole lines, one item each.

const PART_CHARACTERS = 4 * 2 ** 20; // below any body limit that lets a picture in
const URL_LINE = /^https?:\/\/\S+$/;

export class FileProblem extends Error {}

// { text, bytes } of each part: lines of JSON, and how much of the file was read until then. A line
// that is the URL of a picture becomes an item of that id. FileProblem if the file is no list.
export async function* parts(file) {
  let some = [];
  let size = 0;
  let isFirst = true;
  for await (const { line, bytes } of lines(file)) {
    const text = line.trim();
    if (!text) continue;
    if (isFirst) check(text);
    isFirst = false;
    const item = URL_LINE.test(text) ? JSON.stringify({ id: text, image: text }) : text;
    if (size && size + item.length > PART_CHARACTERS) {
      yield { text: some.join("\n"), bytes };
      some = [];
      size = 0;
    }
    some.push(item);
    size += item.length + 1;
  }
  if (isFirst) throw new FileProblem("There is nothing in the file.");
  yield { text: some.join("\n"), bytes: file.size };
}

// The others are the service's to judge: a line that is no item fails alone.
function check(line) {
  if (line.startsWith("{") || URL_LINE.test(line)) return;
  throw new FileProblem("Its first line is neither an item in JSON nor the URL of a picture.");
}

async function* lines(file) {
  const reader = file.stream().getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let bytes = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    bytes += value.length;
    const found = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = found.pop();
    for (const line of found) yield { line, bytes };
  }
  yield { line: rest + decoder.decode(), bytes };
}
