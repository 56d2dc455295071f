//! The same products on Hopper, by warp groups.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::super::hopper::{self, Left};
use super::kernel::DEPTH;
use super::{Plan, Product, multiprocessors};

/// Rows of a tile that a pair of cubes makes.
pub(super) const PAIR_ROWS: usize = 256;
/// Columns of a tile: the wider reads less, of the narrower there are more to share.
pub(super) const TILE_COLUMNS: [usize; 2] = [256, 128];
/// Most products that a launch makes.
pub(super) const MOST: usize = 3;

/// A variant of `wgmma.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Products {
    products: usize,
    sum: bool,
    operand: DType,
    columns: usize,
    /// Whether the summed dimension is the contiguous one, of the left operand and of the right.
    summed_inner: [bool; 2],
    out: DType,
    add: bool,
}

impl hopper::Kernel for Products {
    const NAME: &'static str = "product";
    /// Two warp groups that multiply, and a plane of which a unit copies.
    const UNITS: u32 = 288;

    fn source(&self) -> (Vec<(&'static str, String)>, &'static str) {
        let Self { products, sum, operand, columns, summed_inner: [a_inner, b_inner], out, add } = *self;
        let out = match out {
            DType::F16 => "OUT_F16",
            DType::BF16 => "OUT_BF16",
            _ => "OUT_F32",
        };
        let flag = |flag: bool| u8::from(flag).to_string();
        let list = |count: usize, item: &dyn Fn(usize) -> String| (0..count).map(item).collect::<Vec<_>>().join(", ");
        let results = if sum { 1 } else { products };
        let map = |name: &'static str| move |i| format!("const __grid_constant__ TensorMap {name}_{i}");
        let parameters = [
            list(products, &map("a")),
            list(products, &map("b")),
            list(2 * products, &|_| "const void*".into()),
            list(results, &|i| format!("Out* out_{i}")),
        ];
        let mut definitions = vec![
            ("MEMBERS", products.to_string()),
            ("SUM", flag(sum)),
            ("COLUMNS", columns.to_string()),
            ("A_SUMMED_INNER", flag(a_inner)),
            ("B_SUMMED_INNER", flag(b_inner)),
            ("ADD", flag(add)),
            (out, String::new()),
            ("PARAMETERS", parameters.join(", ")),
            ("A_MAPS", list(products, &|i| format!("&a_{i}"))),
            ("B_MAPS", list(products, &|i| format!("&b_{i}"))),
            ("OUTS", list(results, &|i| format!("out_{i}"))),
            (
                "WGMMA(sums, a, b, add)",
                hopper::wgmma(columns, operand, Left::Shared { summed_inner: a_inner }, b_inner),
            ),
        ];
        if out == "OUT_BF16" {
            definitions.push(("ROUND_BF16", String::new()));
        }
        (definitions, include_str!("wgmma.cu"))
    }

    fn room(&self) -> usize {
        193 * 1024
    }
}

/// Launches products whose parts are to lie in as many `parts`, `[splits, rows, columns]`, or their sum's in one.
pub(super) fn launch<R: CubeRuntime>(products: Vec<Product<R>>, parts: Vec<CubeTensor<R>>, plan: &Plan, add: bool) {
    let &Plan { tile_columns, splits, part, .. } = plan;
    let (client, summed_inner) = (parts[0].client.clone(), products[0].summed_inner);
    let kernel = Products {
        products: products.len(),
        sum: parts.len() < products.len(),
        operand: products[0].operands[0].dtype,
        columns: tile_columns,
        summed_inner,
        out: parts[0].dtype,
        add,
    };
    // A box of the left operand has the rows of a cube, of the right one the half of a tile's columns; where the summed dimension is the
    // outer one, a step's values along it.
    let lines = [PAIR_ROWS / 2, tile_columns / 2];
    let map = |i: usize, product: &Product<R>| {
        hopper::tensor_map(&product.operands[i], if summed_inner[i] { lines[i] } else { DEPTH })
    };
    let maps = [0, 1].into_iter().flat_map(|i| products.iter().map(move |product| map(i, product))).collect();
    let sizes = (0..3).flat_map(|i| products.iter().map(move |product| product.size[i]));
    let constants = sizes.chain([part, splits]).map(|size| size as u64).collect();
    let pairs = |product: &Product<R>| product.size[0].div_ceil(PAIR_ROWS) * product.size[1].div_ceil(tile_columns);
    let pairs: usize = products[..parts.len()].iter().map(pairs).sum::<usize>() * splits;
    let cubes = 2 * pairs.min(multiprocessors(&client) / 2).max(1);
    // SAFETY: copies of what lies behind an operand's end are zeros, and nothing is written behind the result's.
    unsafe { hopper::launch(&client, kernel, cubes, maps, parts, constants) }
}
