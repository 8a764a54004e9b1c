// The kernels of the CPU over shapes at their edges, for a build with sanitizers.
namespace deeplab_fast::cpu {

// Numbers of failures.
int run_convolutions();
int run_batch_norms();

}  // namespace deeplab_fast::cpu

int main() {
  return deeplab_fast::cpu::run_convolutions() + deeplab_fast::cpu::run_batch_norms() == 0 ? 0 : 1;
}
