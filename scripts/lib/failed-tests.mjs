// Names the failed tests of one vitest report (JSON), each with the first lines of its error: what a reader of a
// log that is cut short needs first.
import { existsSync, readFileSync } from 'node:fs';
import path from 'node:path';

const LINES_OF_AN_ERROR = 3;
const report = process.argv[2];

for (const suite of existsSync(report) ? JSON.parse(readFileSync(report, 'utf8')).testResults : []) {
  const place = path.relative(process.cwd(), suite.name);
  const failed = suite.assertionResults.filter(({ status }) => status === 'failed');
  for (const { fullName, failureMessages } of failed)
    print(`${place}: ${fullName}`, failureMessages.join('\n'));
  if (failed.length === 0 && suite.status === 'failed') print(place, suite.message);
}

function print(name, message) {
  const lines = message.split('\n').slice(0, LINES_OF_AN_ERROR);
  console.log([name, ...lines.map((line) => `    ${line.slice(0, 200)}`)].join('\n'));
}
