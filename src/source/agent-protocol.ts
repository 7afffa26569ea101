import { z } from 'zod';
import { AppError } from '../lib/errors.js';

const MAX_WORDS = 500;

const answerSchema = z.union([
  z.object({ return: z.unknown() }),
  z.object({ error: z.object({ class: z.string(), desc: z.string() }) }),
]);

export interface AgentCall {
  timeoutMs: number;
  signal?: AbortSignal | undefined;
}

/** QEMU's guest agent (its "QEMU Guest Agent Protocol Reference"), through whatever reaches it. */
export interface GuestAgent {
  /**
   * Answers the command's `return`: the guest's word, to be checked by the caller. Rejects with SOURCE_REFUSED
   * when the agent says no, SOURCE_UNREACHABLE when it is not there, TIMEOUT, or the signal's reason; the
   * command may still be carried out after the latter two.
   */
  execute(command: string, parameters: Record<string, unknown>, call: AgentCall): Promise<unknown>;
}

/** One line of the protocol, without its end. */
export function commandText(execute: string, parameters: Record<string, unknown>): string {
  return JSON.stringify(
    Object.keys(parameters).length === 0 ? { execute } : { execute, arguments: parameters },
  );
}

/** The `return` of an answer to `command`; SOURCE_REFUSED with the agent's words when it is an error, or nothing known. */
export function readAnswer(command: string, text: string): unknown {
  let answer: z.infer<typeof answerSchema>;
  try {
    answer = answerSchema.parse(JSON.parse(text));
  } catch (error) {
    throw new AppError('SOURCE_REFUSED', `${command}: the guest agent's answer is none`, { cause: error });
  }
  if ('error' in answer) {
    throw new AppError('SOURCE_REFUSED', `${command}: ${answer.error.desc.slice(0, MAX_WORDS)}`, {
      details: { class: answer.error.class.slice(0, MAX_WORDS) },
    });
  }
  return answer.return;
}

/** Checks what the guest said of itself. */
export function checkAnswer<T>(schema: z.ZodType<T>, answer: unknown): T {
  const checked = schema.safeParse(answer);
  if (checked.success) return checked.data;
  throw new AppError('SOURCE_REFUSED', 'the guest agent gave an answer of another kind', {
    cause: checked.error,
  });
}
