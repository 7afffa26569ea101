import { runTool } from '../../../src/lib/process.js';
import { formatBytes, formatDuration } from '../../../src/lib/units.js';
import type { ApiBackup, ApiRun } from '../api-client.js';

/** Prints what happens, for people. */
export class Account {
  #number = 0;

  step(title: string): void {
    this.#number += 1;
    this.#write(`\n${this.#number}. ${title}\n`);
  }

  line(text: string): void {
    this.#write(`   ${text}\n`);
  }

  /** Names and values below each other. */
  facts(facts: Record<string, string>): void {
    const width = Math.max(...Object.keys(facts).map((name) => name.length));
    for (const [name, value] of Object.entries(facts)) this.line(`${name.padEnd(width)}  ${value}`);
  }

  backup(run: ApiRun, point: ApiBackup): void {
    for (const layer of point.layers) {
      this.facts({
        point: `${point.id} (${point.type}, number ${point.sequence} of this machine)`,
        method: `${layer.method}: ${layer.reason.sentence}`,
        disk: formatBytes(layer.sizeBytes),
        read: `${formatBytes(layer.bytesRead)}${rateOf(layer.bytesRead, run)}`,
        written: `${formatBytes(layer.bytesWritten)} as data, ${formatBytes(layer.bytesZeroed)} as zeroes`,
        stored: formatBytes(layer.fileBytes),
        took: durationOf(run),
      });
    }
  }

  restore(run: ApiRun, file: string): void {
    const bytes = run.result?.kind === 'restore' ? (run.result.disks[0]?.bytesWritten ?? 0) : 0;
    this.facts({ file, written: `${formatBytes(bytes)}${rateOf(bytes, run)}`, took: durationOf(run) });
  }

  /** The files of a chain, as stock qemu-img sees them with no help from Holdfast. */
  async chain(top: string): Promise<void> {
    const args = ['info', '--backing-chain', '-U', '-f', 'qcow2', '--output=json', top];
    const { stdout } = await runTool('qemu-img', args, { timeoutMs: 10_000 });
    const images = JSON.parse(stdout) as {
      filename: string;
      'actual-size': number;
      'virtual-size': number;
    }[];
    this.line(`qemu-img info --backing-chain -f qcow2 ${top}`);
    for (const image of images) {
      this.line(`  ${image.filename}`);
      this.line(`    disk ${formatBytes(image['virtual-size'])}, file ${formatBytes(image['actual-size'])}`);
    }
  }

  #write(text: string): void {
    process.stdout.write(text);
  }
}

function durationMs(run: ApiRun): number {
  return Date.parse(run.endedAt ?? run.createdAt) - Date.parse(run.createdAt);
}

function durationOf(run: ApiRun): string {
  return `${formatDuration(durationMs(run))} from the request to the end`;
}

function rateOf(bytes: number, run: ApiRun): string {
  const ms = durationMs(run);
  return ms === 0 || bytes === 0 ? '' : `, ${formatBytes((bytes * 1000) / ms)}/s over the whole run`;
}
