import { access, constants, stat } from 'node:fs/promises';
import { errnoOf, isErrorCode, toAppError } from '../lib/errors.js';
import { runTool } from '../lib/process.js';
import type { EngineContext } from './context.js';
import type { Engine } from './engine.js';
import { lookAtDaemon } from './export-serving.js';
import type { ComponentHealth, DoctorFinding } from './types.js';

type HealthUseCases = Pick<Engine, 'health' | 'doctor'>;

const PING_TIMEOUT_MS = 2_000;
const TOOL_TIMEOUT_MS = 10_000;
const ONE_DIRECTORY = 'Give exports.directory and the exportsDirectory of holdfast-exportd the same value.';
const READABLE_STATUS =
  'Name the pid and status file of holdfast-exportd in exports.pidFile and exports.statusFile, readable by holdfastd.';

interface ToolNeed {
  tool: string;
  package: string;
  isRequired: boolean;
  versionArgs: readonly string[];
}

const TOOLS: readonly ToolNeed[] = [
  { tool: 'qemu-img', package: 'qemu-utils', isRequired: true, versionArgs: ['--version'] },
  { tool: 'qemu-nbd', package: 'qemu-utils', isRequired: true, versionArgs: ['--version'] },
  { tool: 'setpriv', package: 'util-linux', isRequired: true, versionArgs: ['--version'] },
  { tool: 'blkid', package: 'util-linux', isRequired: false, versionArgs: ['--version'] },
  { tool: 'blockdev', package: 'util-linux', isRequired: false, versionArgs: ['--version'] },
  { tool: 'lsblk', package: 'util-linux', isRequired: false, versionArgs: ['--version'] },
  {
    tool: 'qemu-storage-daemon',
    package: 'qemu-system-common',
    isRequired: false,
    versionArgs: ['--version'],
  },
  { tool: 'virsh', package: 'libvirt-clients', isRequired: false, versionArgs: ['--version'] },
  { tool: 'ssh', package: 'openssh-client', isRequired: false, versionArgs: ['-V'] },
];

/** What this host has and lacks, found by trying, with the fix. */
export function createHealthUseCases(context: EngineContext): HealthUseCases {
  return {
    health: () => findHealth(context),
    async doctor() {
      const tools = await Promise.all(TOOLS.map(lookAtTool));
      const components = (await findHealth(context)).map(({ name, isHealthy, message }): DoctorFinding => ({
        name,
        isOk: isHealthy,
        isRequired: true,
        found: message,
        remedy: isHealthy ? null : `See the state of the ${name} and the log of holdfastd.`,
      }));
      return [...tools, await lookAtKvm(), await lookAtExportDaemon(context), ...components];
    },
  };
}

async function findHealth(context: EngineContext): Promise<ComponentHealth[]> {
  const probes: [ComponentHealth['name'], () => Promise<string>][] = [
    ['database', () => context.db.ping(PING_TIMEOUT_MS).then(() => 'answers')],
    ['queue', () => context.queue.ping(PING_TIMEOUT_MS).then(() => 'answers')],
    ['repositories', () => lookAtRepositories(context)],
  ];
  return Promise.all(
    probes.map(async ([name, probe]): Promise<ComponentHealth> => {
      try {
        return { name, isHealthy: true, message: await probe() };
      } catch (error) {
        const { code, message } = toAppError(error);
        return { name, isHealthy: false, message: `${code}: ${message}` };
      }
    }),
  );
}

async function lookAtRepositories(context: EngineContext): Promise<string> {
  const { rows } = await context.db.repositories.list({ limit: 100, cursor: null });
  await Promise.all(rows.map(({ id }) => context.repositories.look(id)));
  return `${rows.length} online`;
}

async function lookAtTool(need: ToolNeed): Promise<DoctorFinding> {
  const facts = { name: need.tool, isRequired: need.isRequired };
  try {
    const { stdout, stderr } = await runTool(need.tool, need.versionArgs, { timeoutMs: TOOL_TIMEOUT_MS });
    return { ...facts, isOk: true, found: firstLine(stdout, stderr), remedy: null };
  } catch (error) {
    if (!isErrorCode(error, 'TOOL_MISSING', 'TOOL_FAILED', 'TIMEOUT')) throw error;
    return {
      ...facts,
      isOk: false,
      found: toAppError(error).message,
      remedy: `apt-get install ${need.package}`,
    };
  }
}

/** ssh tells its version on standard error. */
function firstLine(...texts: string[]): string {
  return texts.join('').split('\n')[0] ?? '';
}

/** The device node alone proves nothing; what needs KVM boots something to find out. */
async function lookAtKvm(): Promise<DoctorFinding> {
  const facts = { name: '/dev/kvm', isRequired: false };
  try {
    await stat('/dev/kvm');
    await access('/dev/kvm', constants.R_OK | constants.W_OK);
    return { ...facts, isOk: true, found: 'present (not proven to boot)', remedy: null };
  } catch (error) {
    return {
      ...facts,
      isOk: false,
      found: errnoOf(error) ?? 'unknown',
      remedy: 'Not needed for backup and restore.',
    };
  }
}

/** Needed only by who publishes, or has backups pushed. */
async function lookAtExportDaemon(context: EngineContext): Promise<DoctorFinding> {
  const facts = { name: 'export daemon', isRequired: false };
  try {
    const { status, problem } = await lookAtDaemon(context);
    if (problem !== null) {
      const remedy = 'exportsDirectory' in problem.details ? ONE_DIRECTORY : problem.remedy;
      return { ...facts, isOk: false, found: problem.message, remedy };
    }
    const files = status?.files ?? [];
    const served = files.filter(({ state }) => state === 'served');
    return { ...facts, isOk: true, found: `serves ${served.length} of ${files.length} files`, remedy: null };
  } catch (error) {
    return { ...facts, isOk: false, found: toAppError(error).message, remedy: READABLE_STATUS };
  }
}
